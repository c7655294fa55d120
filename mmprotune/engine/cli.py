"""What the command-line tools share: reading a config, setting up processes, building a Runner."""
from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import logging
import os
import os.path as osp
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from urllib.error import URLError

import torch
import torch.distributed as torch_dist
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS as ROOT_MODEL_WRAPPERS
from mmengine.registry import RUNNERS, Registry
from mmengine.runner import Runner
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mmprotune.config_nodes import dicts_in, file_of, type_name

# mmcv's names of the layer that synchronises batch statistics between processes.
SYNC_BN_TYPES = ('SyncBN', 'MMSyncBN')
CPU_WRAPPER = 'mmprotune.CPUDistributedDataParallel'

MODEL_WRAPPERS = Registry(
    'model_wrapper',
    parent=ROOT_MODEL_WRAPPERS,
    scope='mmprotune',
    locations=['mmprotune.engine.cli'])


class LaunchError(ValueError):
    """A command line or a config key that a tool cannot act on. Printed without a traceback."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that training and testing have in common."""
    parser.add_argument(
        'config', help='config file, or the name of an installed one: mmdet::retinanet/…_coco.py')
    parser.add_argument('--work-dir', help='directory of logs and checkpoints')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override keys of the config: key=value, key=a,b or key="[a,b]"; nested lists and '
        'tuples too, e.g. key="[(a,b),(c,d)]" (quoted, without blanks)')
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
    from mmprotune.datasets.checked import dataset_error
    try:
        main()
    except Exception as error:
        told = error
        if not isinstance(error, URLError) and not _is_ours(error):
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
    return 0


def _is_ours(error: Exception) -> bool:
    """Whether an error is of a class that this package made: those name their cause."""
    return any(cls.__module__.partition('.')[0] == 'mmprotune' for cls in type(error).__mro__)


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
            return Config.fromfile(name)

        package = name.partition('::')[0]
        # get_config would go and install a package that is missing.
        if importlib.util.find_spec(package) is None:
            raise LaunchError(f'config {name!r}: the package {package!r} is not installed')
        try:
            return get_config(name if name.endswith('.py') else f'{name}.py')
        except (AssertionError, FileNotFoundError) as error:
            raise LaunchError(f'config {name!r} is not shipped by {package!r}: {error}') from error


def wrap_config(cfg: Config, options: dict | None = None) -> Config:
    """Acts on ``--protune``: :func:`mmprotune.protune`, with its errors named after the flag.

    Args:
        cfg (Config): The config; changed in place.
        options (dict, optional): Those of ``--cfg-options``, which act on the wrapped config. A
            ``load_from`` among them already says what the backbone is frozen at.

    Returns:
        Config: ``cfg``.
    """
    from mmprotune.engine.config import protune
    if options and 'load_from' in options:
        cfg.load_from = options['load_from']
    try:
        return protune(cfg)
    except (TypeError, ValueError) as error:
        raise LaunchError(f'--protune: {error}') from error


def set_work_dir(cfg: Config, args: argparse.Namespace, suffix: str = '') -> None:
    """Sets ``cfg.work_dir``: the argument, else the config's, else one named after the config."""
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        stem = osp.splitext(osp.basename(args.config.rpartition('::')[2]))[0]
        cfg.work_dir = osp.join('work_dirs', stem + suffix)


def check_checkpoint_path(option: str, path: str) -> None:
    """Raises :class:`LaunchError` when a local checkpoint file does not exist."""
    if '://' not in path and not osp.isfile(osp.expanduser(path)):
        raise LaunchError(f'{option}: no file {path!r}')


def set_resume(cfg: Config, resume: str | None) -> None:
    """Acts on ``--resume``.

    Args:
        cfg (Config): The config; ``work_dir`` is set.
        resume (str, optional): A checkpoint, or 'auto': the newest one in ``work_dir``. Where
            ``work_dir`` has none, training starts anew and ``load_from`` keeps its meaning, so
            that the first start of a job that will be resumed needs no other command line. Where
            that start filled the frozen backbone from ``load_from``, so does the next.

    Raises:
        CheckpointError: The newest one cannot be resumed from.
    """
    if resume is None:
        return
    if resume == 'auto':
        from mmprotune.checkpoint import newest
        resume = newest(cfg.work_dir)
        if resume is None:
            notify(f'--resume: no checkpoint in {cfg.work_dir!r}, training starts anew')
            return
    check_checkpoint_path('--resume', resume)
    if '://' not in resume:
        _fill_as_trained(cfg, resume)
    cfg.resume = True
    cfg.load_from = resume


def _fill_as_trained(cfg: Config, resume: str) -> None:
    """Sets ``frozen_from`` as the run that wrote a checkpoint did when it started."""
    from mmprotune.checkpoint import UnreadableCheckpoint, frozen_origins
    from mmprotune.config_nodes import node_of, prompted_nodes, training_patterns
    try:
        origins = frozen_origins(resume)
    except UnreadableCheckpoint:  # the Runner refuses it when it loads it
        return
    nodes = prompted_nodes(cfg.get('model'))
    for path, (source, names) in origins.items():
        node = node_of(path, nodes)
        if node is not None and node.get('frozen_from') is None:
            node['frozen_from'] = source
            patterns = training_patterns(node, names)
            if patterns:
                node['trainable'] = patterns
            notify(f'--resume: the run was started with load_from={source!r}: '
                   f'model.{path}.frozen_from is set to it')


def use_amp(cfg: Config) -> None:
    """Turns automatic mixed precision on in ``cfg.optim_wrapper``.

    Raises:
        LaunchError: There is no GPU, or the config has an optimizer wrapper of its own.
    """
    if get_device() in ('cpu', 'mps'):
        raise LaunchError('--amp needs a GPU (or NPU, MLU, MUSA device), and none was found; '
                          'leave --amp out to train in float32')
    wrapper = type_name(cfg.optim_wrapper) or 'OptimWrapper'
    if wrapper not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise LaunchError('--amp: optim_wrapper.type must be OptimWrapper or AmpOptimWrapper, '
                          f'got {wrapper!r}')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def use_auto_scale_lr(cfg: Config) -> None:
    """Lets the Runner scale the learning rate with the batch size.

    Raises:
        LaunchError: The config does not say which batch size its learning rate is meant for.
    """
    if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
        raise LaunchError('--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the '
                          'batch size (all processes together) that its learning rate is for')
    cfg.auto_scale_lr.enable = True


def without_pretrained(cfg: Config) -> Config:
    """A copy of a config whose model builds without any weight file.

    Drops every ``init_cfg`` of type Pretrained, every ``pretrained``, ``checkpoint_path`` and
    ``frozen_from``; a ``PromptedBackbone`` gets ``freeze='all'``, as there is no file left that
    could say what is to be frozen.

    Args:
        cfg (Config): The config, left as it is.

    Returns:
        Config: The copy.
    """
    cfg = copy.deepcopy(cfg)
    for node in dicts_in(cfg.get('model')):
        if type_name(node) == 'PromptedBackbone':
            node['freeze'] = 'all'
        for key in ('pretrained', 'checkpoint_path', 'frozen_from'):
            node.pop(key, None)
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, (list, tuple)):
            node['init_cfg'] = [one for one in init_cfg if file_of(one) is None]
        elif file_of(init_cfg) is not None:
            del node['init_cfg']
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Builds the Runner of a config, on whatever there is: GPUs, one CPU, several CPU processes.

    Args:
        cfg (Config): The config; ``launcher`` and ``work_dir`` are set. Changed in place.

    Returns:
        Runner: The Runner. It may be of the type that ``cfg.runner_type`` names.
    """
    from mmprotune.datasets.checked import check_data
    from mmprotune.engine.prompt_rates import set_prompt_rates
    notices = prepare_processes(cfg)
    rates = set_prompt_rates(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _set_dataloader_defaults(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.logger.addFilter(_OneFrozenNotice())
    check_data(runner)
    for notice in notices:
        runner.logger.warning(notice)
    for sentence in rates:
        runner.logger.info(sentence)
    return runner


def prepare_processes(cfg: Config) -> list[str]:
    """Makes a config run on the devices and processes that are there.

    * Several processes without an accelerator: the gloo group is initialised here, as MMEngine
      would set a CUDA device first, and the model gets :class:`CPUDistributedDataParallel`.
    * SyncBN outside a group of GPU processes: the Runner (one process) or the wrapper (several)
      reverts the layers to BatchNorm. ``MMSyncBN`` cannot even be built without a group, and
      becomes ``SyncBN`` in the config.

    Args:
        cfg (Config): The config; changed in place.

    Returns:
        list[str]: What the user should be told, a sentence each.
    """
    notices = []
    alone = cfg.get('launcher', 'none') == 'none'
    on_cpu = get_device() == 'cpu'
    wrapper = dict(cfg.get('model_wrapper_cfg') or {})
    if type_name(wrapper) == type_name(CPU_WRAPPER):
        # The config was written by a run on CPU processes; this one may have GPUs.
        wrapper = {}
        cfg.model_wrapper_cfg = None
    if not alone and (on_cpu or _attempt() > 0):
        _init_group(cfg, 'gloo' if on_cpu else None)
    if not alone and on_cpu:
        if type_name(wrapper) in ('', 'MMDistributedDataParallel'):
            wrapper['type'] = CPU_WRAPPER
            wrapper.setdefault('broadcast_buffers', False)
            wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
        # Present, so that the Runner does not put the local rank there.
        wrapper['device_ids'] = None
        cfg.model_wrapper_cfg = wrapper
        notices.append('no GPU: the processes run on the CPU and talk over gloo')

    if alone or on_cpu:
        found = {_norm_name(node) for node in dicts_in(cfg.get('model'))} & {*SYNC_BN_TYPES}
        if cfg.get('sync_bn') is not None and not alone:
            found.add(f'sync_bn={cfg.sync_bn}')
            cfg.sync_bn = None
        if found:
            reason = 'one process' if alone else 'CPU processes'
            notices.append(f'{", ".join(sorted(found))} in the config: reverted to BatchNorm '
                           f'for this run, as {reason} cannot synchronise batch statistics')
    if alone:
        for node in dicts_in(cfg.get('model')):
            if _norm_name(node) == 'MMSyncBN':
                node['type'] = 'SyncBN'
                node.pop('group', None)
                node.pop('stats_mode', None)
    return notices


def _norm_name(node: dict) -> str:
    """The registered name of a config's type, where that is one of the classes of SyncBN."""
    kind = node.get('type')
    if isinstance(kind, type) and kind.__name__ == 'SyncBatchNorm':  # mmcv's and PyTorch's
        return 'MMSyncBN' if kind.__module__.startswith('mmcv') else 'SyncBN'
    return type_name(kind)


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's data-parallel wrapper for CPU processes: no device ids, and no SyncBN.

    Args:
        module (nn.Module): The model; its SyncBN layers are reverted to BatchNorm.
        kwargs: See :class:`mmengine.model.MMDistributedDataParallel`.
    """

    def __init__(self, module, **kwargs) -> None:
        kwargs['device_ids'] = None
        super().__init__(module=revert_sync_batchnorm(module), **kwargs)


def _attempt() -> int:
    """How often torchrun has restarted the processes of this machine, where it is the only one."""
    one_machine = os.environ.get('GROUP_WORLD_SIZE') == '1'
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0) if one_machine else 0


def _init_group(cfg: Config, backend: str | None) -> None:
    """Initialises the process group from the launcher's environment variables.

    Args:
        cfg (Config): The config.
        backend (str, optional): None means the config's, for GPUs.
    """
    if is_distributed():
        return
    dist_cfg = (cfg.get('env_cfg') or {}).get('dist_cfg') or {}
    env = os.environ
    if cfg.launcher == 'slurm':
        names = dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID')
    elif cfg.launcher == 'mpi':
        names = dict(
            RANK='OMPI_COMM_WORLD_RANK',
            WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
            LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK')
    else:
        names = dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK')
    missing = [name for name in names.values() if name not in env]
    if missing:
        raise LaunchError(f'--launcher {cfg.launcher}: {", ".join(missing)} not set; was the '
                          'process started by that launcher (tools/dist_*.sh, tools/slurm_*.sh)?')
    env.update({ours: env[theirs] for ours, theirs in names.items()})

    env.setdefault('MASTER_PORT', str(dist_cfg.get('port') or 29500))
    if 'MASTER_ADDR' not in env:
        if cfg.launcher != 'slurm':
            raise LaunchError(f'--launcher {cfg.launcher}: MASTER_ADDR not set')
        env['MASTER_ADDR'] = subprocess.run(
            ['scontrol', 'show', 'hostnames', env['SLURM_NODELIST']],
            check=True, capture_output=True, text=True).stdout.split()[0]
    kwargs = {}
    if dist_cfg.get('timeout') is not None:
        kwargs['timeout'] = datetime.timedelta(seconds=dist_cfg['timeout'])
    if backend is None:
        backend = dist_cfg.get('backend', 'nccl')
        torch.cuda.set_device(int(env['LOCAL_RANK']) % torch.cuda.device_count())
    if _attempt() > 0:
        # torchrun's store lives on, with the addresses of the processes that died. Each attempt
        # needs keys of its own, or it may wait for them for ever.
        store, kwargs['rank'], kwargs['world_size'] = next(rendezvous('env://'))
        kwargs['store'] = PrefixStore(f'attempt_{_attempt()}', store)
    torch_dist.init_process_group(backend, **kwargs)


def _set_dataloader_defaults(cfg: Config) -> None:
    """mmpretrain's own tools add these to its data loaders; its configs count on it."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(key)
        if loader:
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', bool(loader.get('num_workers', 0)))
            loader.setdefault('collate_fn', dict(type='default_collate'))


class _OneFrozenNotice(logging.Filter):
    """One line instead of one warning for each frozen parameter.

    With a ``paramwise_cfg``, MMEngine's optimizer constructor warns for every parameter that does
    not train. In a prompted model that is the whole backbone, and on purpose.
    """
    _pattern = re.compile(r'is skipped since its\s+requires_grad=False')

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not self._pattern.search(record.getMessage()):
            return True
        if self._told:
            return False
        self._told = True
        record.msg, record.args = 'optimizer: frozen parameters are left out', ()
        record.levelno, record.levelname = logging.INFO, 'INFO'
        return True


def notify(message: str) -> None:
    """Tells the user something before the Runner and its logger exist."""
    MMLogger.get_current_instance().warning(message)
