"""What the command-line tools share: arguments, reading a config, printing errors."""
from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import os.path as osp
import sys
import traceback
import warnings
from collections.abc import Callable
from urllib.error import URLError

import torch
import torch.distributed as torch_dist
from mmengine.config import Config, DictAction
from mmengine.dist import is_distributed
from mmengine.hub import get_config
from mmengine.logging import MMLogger

from mmprotune.config_nodes import dicts_in
from mmprotune.engine.config import protune
from mmprotune.errors import LaunchError, MMProtuneError


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and what changes it, for :func:`read_config`."""
    parser.add_argument(
        'config', help='config file, or the name of an installed one: mmdet::retinanet/…_coco.py')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override keys of the config: key=value, key=a,b or key="[a,b]"; nested lists and '
        'tuples too, e.g. key="[(a,b),(c,d)]" (quoted, without blanks)')


def add_arguments(parser: argparse.ArgumentParser, checkpoint: bool = False) -> None:
    """Adds the arguments that training and testing have in common, for :func:`set_up`.

    Args:
        parser (argparse.ArgumentParser): The tool's.
        checkpoint (bool): Whether a checkpoint is named behind the config. Defaults to False.
    """
    add_config_arguments(parser)
    if checkpoint:
        parser.add_argument('checkpoint', help='checkpoint file, slim or full')
    parser.add_argument('--work-dir', help='directory of logs and checkpoints')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started')
    # Older launchers of PyTorch hand the rank over as an argument instead of LOCAL_RANK.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def run_tool(main: Callable[[], None]) -> int:
    """Runs a tool's main function; errors that name their cause are printed in one message.

    With the environment variable ``MMPROTUNE_DEBUG=1`` they keep their traceback. All other errors
    (a registry's, a dataset's) are the host's, and pass.

    Args:
        main (Callable): The function.

    Returns:
        int: Exit status, 0 or 1.
    """
    try:
        main()
    except Exception as error:
        told = error
        if not isinstance(error, (URLError, MMProtuneError)):
            told = _transformers_error(error)
            if told is None:
                from mmprotune.datasets.checked import dataset_error  # mmseg, which takes seconds
                told = dataset_error(error)
        if told is None or os.environ.get('MMPROTUNE_DEBUG') == '1':
            raise
        if isinstance(told, URLError):
            told = (f'a file that the config names by its address could not be downloaded: {told}'
                    f'; a copy in {osp.join(torch.hub.get_dir(), "checkpoints")} is used as well')
        if 'DataLoader worker process' in str(told):  # a whole traceback, the error at its end
            told = str(told).strip().splitlines()[-1].partition(': ')[2]
        # One write: lines of several processes must not mix.
        sys.stderr.write(f'{osp.basename(sys.argv[0])}: error: {told}\n')
        return 1
    if is_distributed():
        torch_dist.destroy_process_group()
        # The wrapped model, in a reference cycle with its hooks, keeps the group and its threads.
        # One that lets go of a Python object while the interpreter ends, aborts the process.
        gc.collect()
    return 0


def _transformers_error(error: Exception) -> LaunchError | None:
    """Names transformers where mmpretrain misses what newer ones dropped.

    mmpretrain imports its multimodal models whenever transformers is installed.
    """
    modules = [frame.filename.replace(os.sep, '/') for frame in
               traceback.extract_tb(error.__traceback__) if frame.name == '<module>']
    if (not isinstance(error, (ImportError, TypeError))
            or not any('mmpretrain/models/multimodal' in file for file in modules)):
        return None
    found = getattr(sys.modules.get('transformers'), '__version__', '')
    return LaunchError(f'mmpretrain does not import beside transformers {found} ({error}): '
                       'pip install "transformers<4.52", or pip uninstall transformers')


def read_config(args: argparse.Namespace) -> Config:
    """The config that a command line asks for: read, wrapped by ``--protune``, and overridden.

    Args:
        args (argparse.Namespace): Of :func:`add_config_arguments` or :func:`add_arguments`, and
            ``protune`` where the tool has it.

    Returns:
        Config: The config.

    Raises:
        LaunchError: There is none, or it cannot be wrapped.
    """
    cfg = load_config(args.config)
    if getattr(args, 'protune', False):
        wrap_config(cfg, args.cfg_options)
    if 'launcher' in args:
        cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def set_up(args: argparse.Namespace) -> Config:
    """What training and testing begin with: rank, config, work directory, checkpoint to test.

    Args:
        args (argparse.Namespace): Of :func:`add_arguments`.

    Returns:
        Config: As :func:`read_config`, with ``work_dir``, and ``load_from`` where a checkpoint is
        named.

    Raises:
        LaunchError: There is no such config or checkpoint.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if 'checkpoint' in args:
        check_checkpoint_path('checkpoint', args.checkpoint)
    cfg = read_config(args)
    set_work_dir(cfg, args)
    if 'checkpoint' in args:
        cfg.load_from, cfg.resume = args.checkpoint, False
    return cfg


def load_config(name: str) -> Config:
    """Reads a config file, or one that an installed OpenMMLab library ships.

    Args:
        name (str): A path, or ``package::path/in/configs.py``.

    Returns:
        Config: The config.

    Raises:
        LaunchError: There is no such file, package or config.
    """
    with warnings.catch_warnings():
        # MMEngine looks `package::` up with pkg_resources, several times a config.
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
        if '::' not in name:
            if not osp.isfile(name):
                raise LaunchError(f'config: no file {name!r}')
            return _without_own_scope(Config.fromfile(name))

        package, _, path = name.partition('::')
        if '/' not in path:
            raise LaunchError(f'config {name!r}: expected package::folder/file.py')
        # get_config would go and install a package that is missing.
        if importlib.util.find_spec(package) is None:
            raise LaunchError(f'config {name!r}: the package {package!r} is not installed')
        try:
            return _without_own_scope(
                get_config(name if name.endswith('.py') else f'{name}.py'))
        except (AssertionError, FileNotFoundError) as error:
            raise LaunchError(f'config {name!r} is not shipped by {package!r}: {error}') from error


def _without_own_scope(cfg: Config) -> Config:
    """Takes off the scope that MMEngine puts on what is inherited by ``mmprotune::…``.

    What is ours says so in its ``type``; all else in those files is of the host whose config they
    are part of, and would be looked for here alone.
    """
    for node in dicts_in(cfg._cfg_dict):
        if node.get('_scope_') == 'mmprotune':
            del node['_scope_']
    return cfg


def wrap_config(cfg: Config, options: dict | None = None) -> Config:
    """Acts on ``--protune``: :func:`mmprotune.protune`, with its errors named after the flag.

    Args:
        cfg (Config): The config; changed in place.
        options (dict, optional): Those of ``--cfg-options``, which act on the wrapped config. A
            ``load_from`` among them already says what the backbone is frozen at.

    Returns:
        Config: ``cfg``.
    """
    if options and 'load_from' in options:
        cfg.load_from = options['load_from']
    try:
        return protune(cfg)
    except (TypeError, ValueError) as error:
        raise LaunchError(f'--protune: {error}') from error


def set_work_dir(cfg: Config, args: argparse.Namespace) -> None:
    """Sets ``cfg.work_dir``: the argument, else the config's, else one named after the config."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        stem = osp.splitext(osp.basename(args.config.rpartition('::')[2]))[0]
        suffix = '_protune' if getattr(args, 'protune', False) else ''
        cfg.work_dir = osp.join('work_dirs', stem + suffix)


def check_checkpoint_path(option: str, path: str) -> None:
    """Raises :class:`LaunchError` when a local checkpoint file does not exist."""
    if '://' not in path and not osp.isfile(osp.expanduser(path)):
        raise LaunchError(f'{option}: no file {path!r}')


def notify(message: str) -> None:
    """Tells the user something before the Runner and its logger exist."""
    MMLogger.get_current_instance().warning(message)
