"""Pro-tunes a stock config as it is: ``tools/train.py --protune``."""
from __future__ import annotations

import copy
import logging

from mmengine.config import Config
from mmengine.logging import print_log

from mmprotune.config_nodes import file_of, find_backbones, type_name
from mmprotune.engine.prompt_rates import set_prompt_rates

HOOKS = ('mmprotune.PromptCheckpointHook', 'mmprotune.FreezeGuardHook', 'mmprotune.PromptStatsHook')


def protune(cfg: Config, **options) -> Config:
    """Wraps the backbone of a stock config in ``PromptedBackbone`` and adds this package's hooks.

    The backbone may be anywhere in the model (a tracker's or a semi-supervised model's detector has
    it), as long as there is one. Where a checkpoint of a whole model is to be trained on from
    (``load_from``, or the ``init_cfg`` of what holds the backbone), the backbone is frozen at that
    file's weights (``frozen_from``). Prompts get the head's rate, see
    :func:`~mmprotune.engine.prompt_rates.set_prompt_rates`.

    Args:
        cfg (Config): Config of mmdet, mmseg or mmpretrain; changed in place.
        **options: Arguments of ``PromptedBackbone`` other than its defaults.

    Returns:
        Config: ``cfg``.

    Raises:
        ValueError: The model of the config has no backbone, or several.
    """
    around = _around_the_backbone(cfg.get('model'))
    owner = around[-1]
    backbone = owner['backbone']
    if type_name(backbone) == 'PromptedBackbone':
        print_log('model.backbone is a PromptedBackbone already', logger='current')
    else:
        inner = copy.deepcopy(backbone)
        inner.pop('_delete_', None)
        # Segmentors hand `pretrained` on to the backbone, and inferencers delete it: it moves to
        # where it stays.
        pretrained = owner.pop('pretrained', None)
        if pretrained and not inner.get('init_cfg') and not inner.get('pretrained'):
            inner['init_cfg'] = dict(type='Pretrained', checkpoint=pretrained)
        source = _whole_model_file(cfg, around)
        if source is not None:
            options.setdefault('frozen_from', source)
        owner['backbone'] = dict(
            type='mmprotune.PromptedBackbone',
            backbone=inner,
            **{'prompt': dict(type='mmprotune.PromptBlock'), **options})
    hooks = list(cfg.get('custom_hooks') or [])
    present = {type_name(h) for h in hooks if isinstance(h, dict)}
    cfg.custom_hooks = hooks + [dict(type=name) for name in HOOKS if type_name(name) not in present]
    for sentence in set_prompt_rates(cfg):
        print_log(sentence, logger='current')
    constructor = (cfg.get('optim_wrapper') or {}).get('constructor')
    if constructor is not None:
        print_log(f'optim_wrapper.constructor={type_name(constructor)!r} is kept: it may '
                  'tell layers apart by names, which a wrapped backbone changes',
                  logger='current', level=logging.WARNING)
    return cfg


def _around_the_backbone(model: object) -> list[dict]:
    """The dicts around the one backbone of a model; the last one holds it."""
    found = find_backbones(model)
    wrapped = [around for _, around in found
               if type_name(around[-1]['backbone']) == 'PromptedBackbone']
    if wrapped:  # the user chose among several
        return wrapped[0]
    if len(found) == 1:
        return found[0][1]
    if not found:
        raise ValueError('expected a config with model.backbone, or one backbone further inside, '
                         f'got {sorted(model) if isinstance(model, dict) else model!r}')
    paths = [f'model.{path}' for path, _ in found]
    raise ValueError(
        f'the model has {len(found)} backbones: {", ".join(paths)}. Wrap the one that is meant in '
        f"the config itself: {paths[0]}=dict(type='mmprotune.PromptedBackbone', backbone=<what is "
        "there now>, prompt=dict(type='mmprotune.PromptBlock'))")


def _whole_model_file(cfg: Config, around: list[dict]) -> str | None:
    """The checkpoint of a whole model that would overwrite the backbone's own pre-trained file.

    ``load_from`` comes last and so counts first; of several ``init_cfg`` MMEngine takes the
    outermost. A file to resume from is this very run's.
    """
    if cfg.get('load_from') and not cfg.get('resume'):
        return cfg.load_from
    for node in around:
        if file_of(node.get('init_cfg')) is not None:
            return file_of(node['init_cfg'])
    return None
