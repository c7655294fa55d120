"""What training sets in a config before the Runner is built, and which files it looks for."""
from __future__ import annotations

import os.path as osp

from mmengine.config import Config
from mmengine.device import get_device

from mmprotune.checkpoints.resuming import newest
from mmprotune.config_nodes import (
    FILE_KEYS,
    file_of,
    node_of,
    nodes_in,
    prompted_nodes,
    training_patterns,
    type_name,
)
from mmprotune.engine import cli
from mmprotune.errors import LaunchError


def check_pretrained_files(cfg: Config) -> None:
    """Looks for the pre-trained files that the model names by a path, before training builds it.

    A checkpoint to load stands in for those of a frozen backbone, which it may hold.

    Args:
        cfg (Config): The config; ``load_from`` is set.

    Raises:
        LaunchError: There is none.
    """
    frozen = [f'model.{path}' for path, _ in prompted_nodes(cfg.get('model'))]
    for path, node in nodes_in(cfg.get('model'), 'model'):
        if cfg.get('load_from') and path.startswith(tuple(frozen)):
            continue
        named = {'init_cfg.checkpoint': file_of(node.get('init_cfg')),
                 **{key: node.get(key) for key in (*FILE_KEYS, 'frozen_from')}}
        for key, file in named.items():
            # Some models take the name of a variant for `pretrained`.
            if isinstance(file, str) and ':' not in file and osp.splitext(file)[1] and \
                    not osp.isfile(osp.expanduser(file)):
                raise LaunchError(f'{path}.{key}: no file {file!r}; --cfg-options '
                                  f'{path}.{key}=PATH names another')


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
        resume = newest(cfg.work_dir)
        if resume is None:
            cli.notify(f'--resume: no checkpoint in {cfg.work_dir!r}, training starts anew')
            return
    cli.check_checkpoint_path('--resume', resume)
    if '://' not in resume:
        _fill_as_trained(cfg, resume)
    cfg.resume = True
    cfg.load_from = resume


def _fill_as_trained(cfg: Config, resume: str) -> None:
    """Sets ``frozen_from`` as the run that wrote a checkpoint did when it started."""
    from mmprotune.checkpoint import UnreadableCheckpoint, frozen_origins
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
            cli.notify(f'--resume: the run was started with load_from={source!r}: '
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
