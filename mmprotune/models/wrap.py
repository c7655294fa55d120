"""Pro-tunes a stock config as it is: ``tools/train.py --protune``."""
from __future__ import annotations

import copy
import logging

from mmengine.config import Config
from mmengine.logging import print_log

HOOKS = ('mmprotune.PromptCheckpointHook', 'mmprotune.FreezeGuardHook', 'mmprotune.PromptStatsHook')


def protune(cfg: Config, **options) -> Config:
    """Wraps the backbone of a stock config in ``PromptedBackbone`` and adds this package's hooks.

    Args:
        cfg (Config): Config of mmdet, mmseg or mmpretrain; changed in place.
        **options: Arguments of ``PromptedBackbone`` other than its defaults.

    Returns:
        Config: ``cfg``.

    Raises:
        ValueError: The config has no ``model.backbone``.
    """
    model = cfg.get('model')
    if not isinstance(model, dict) or not isinstance(model.get('backbone'), dict):
        raise ValueError('expected a config with model.backbone, got '
                         f'{sorted(model) if isinstance(model, dict) else model!r}')
    backbone = model['backbone']
    if str(backbone.get('type')).endswith('PromptedBackbone'):
        print_log('model.backbone is a PromptedBackbone already', logger='current')
    else:
        inner = copy.deepcopy(backbone)
        inner.pop('_delete_', None)
        # Segmentors hand `pretrained` on to the backbone, and inferencers delete it: it moves to
        # where it stays.
        pretrained = model.pop('pretrained', None)
        if pretrained and not inner.get('init_cfg') and not inner.get('pretrained'):
            inner['init_cfg'] = dict(type='Pretrained', checkpoint=pretrained)
        model['backbone'] = dict(
            type='mmprotune.PromptedBackbone',
            backbone=inner,
            **{'prompt': dict(type='mmprotune.PromptBlock'), **options})
    hooks = list(cfg.get('custom_hooks') or [])
    present = {str(h.get('type')) for h in hooks if isinstance(h, dict)}
    cfg.custom_hooks = hooks + [dict(type=name) for name in HOOKS if name not in present]
    if 'constructor' in (cfg.get('optim_wrapper') or {}):
        print_log(f"optim_wrapper.constructor={cfg.optim_wrapper['constructor']!r} is kept: it may "
                  'tell layers apart by names, which a wrapped backbone changes',
                  logger='current', level=logging.WARNING)
    return cfg
