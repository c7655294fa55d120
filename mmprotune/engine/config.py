"""Pro-tunes a stock config as it is: ``tools/train.py --protune``."""
from __future__ import annotations

import copy
import logging

from mmengine.config import Config
from mmengine.logging import print_log

from mmprotune.config_nodes import dicts_in, file_of, find_backbones, prompted_nodes, type_name
from mmprotune.engine.optim import PROMPT_MULTIPLIERS
from mmprotune.errors import LaunchError

HOOKS = ('mmprotune.PromptCheckpointHook', 'mmprotune.FreezeGuardHook', 'mmprotune.PromptStatsHook')
# Their rates fall with a layer's depth in the backbone, which they read off parameter names.
DETECTION_DECAY = ('LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor')
CLASSIFICATION_DECAY = 'LearningRateDecayOptimWrapperConstructor'
CONSTRUCTOR = 'mmprotune.PromptOptimWrapperConstructor'
# Where prompts go in a library's models, by the measurements in docs/results/methods.md; elsewhere
# PromptedBackbone's default: necks of detectors keep stage ends anyway, and do as well with them.
INSERT = dict(mmseg='auto', mmpretrain='auto')


def protune(cfg: Config, prompt_rates: dict | None = None, **options) -> Config:
    """Wraps the backbone of a stock config in ``PromptedBackbone`` and adds this package's hooks.

    The backbone may be anywhere in the model (a tracker's or a semi-supervised model's detector has
    it), as long as there is one. Where a checkpoint of a whole model is to be trained on from
    (``load_from``, or the ``init_cfg`` of what holds the backbone), the backbone is frozen at that
    file's weights (``frozen_from``). Prompts get the head's rate, see
    :func:`~mmprotune.engine.config.set_prompt_rates`, and in the models of mmseg and mmpretrain
    (``default_scope``) stand where ``insert='auto'`` says.

    Args:
        cfg (Config): Config of mmdet, mmseg or mmpretrain; changed in place.
        prompt_rates (dict, optional): ``lr_mult`` and ``decay_mult``, what prompts get of the
            head's learning rate and weight decay: ``optim_wrapper.paramwise_cfg.prompts``.
            Defaults to None: what the config says there, else the same.
        **options: Arguments of ``PromptedBackbone`` other than its defaults.

    Returns:
        Config: ``cfg``.

    Raises:
        LaunchError: The model of the config has no backbone, or several.
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
        insert = INSERT.get(cfg.get('default_scope'))
        if insert and options.get('last_stage', 'residual') == 'residual':
            options.setdefault('insert', insert)
        owner['backbone'] = dict(
            type='mmprotune.PromptedBackbone',
            backbone=inner,
            **{'prompt': dict(type='mmprotune.PromptBlock'), **options})
    hooks = list(cfg.get('custom_hooks') or [])
    present = {type_name(h) for h in hooks if isinstance(h, dict)}
    cfg.custom_hooks = hooks + [dict(type=name) for name in HOOKS if type_name(name) not in present]
    if prompt_rates is not None:
        for node in dicts_in(cfg.get('optim_wrapper')):
            if 'optimizer' in node:
                node['paramwise_cfg'] = dict(node.get('paramwise_cfg') or {}, prompts=prompt_rates)
    for sentence in set_prompt_rates(cfg):
        print_log(sentence, logger='current')
    constructor = type_name((cfg.get('optim_wrapper') or {}).get('constructor'))
    if constructor not in ('', type_name(CONSTRUCTOR)):
        print_log(f'optim_wrapper.constructor={constructor!r} is kept: it may '
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
        raise LaunchError('expected a config with model.backbone, or one backbone further inside, '
                          f'got {sorted(model) if isinstance(model, dict) else model!r}')
    paths = [f'model.{path}' for path, _ in found]
    raise LaunchError(
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


# --- rates -------------------------------------------------------------------------------------


def set_prompt_rates(cfg: Config) -> list[str]:
    """Gives prompts the head's learning rate and weight decay, in every optimizer of a config.

    * Multipliers for the backbone were found for weights that train, and the head may have some of
      its own. Where there are custom keys, or ``paramwise_cfg.prompts``,
      :class:`~mmprotune.engine.optim.PromptOptimWrapperConstructor` takes the place of MMEngine's
      default constructor.
    * A constructor that lets rates fall with the depth has nothing to do in a frozen backbone, and
      cannot read the names in a wrapped one: MMEngine's default constructor takes its place, with
      the weight decay that it would have set.

    Args:
        cfg (Config): The config; changed in place. Without a ``PromptedBackbone`` it stays.

    Returns:
        list[str]: What was done, a sentence each.

    Raises:
        LaunchError: ``paramwise_cfg.prompts`` beside a constructor that does not know it.
    """
    wrapped = [wrapper for _, wrapper in prompted_nodes(cfg.get('model'))]
    if not wrapped:
        return []
    done = []
    for node in dicts_in(cfg.get('optim_wrapper')):
        if 'constructor' in node:
            done += _drop_layer_decay(node)
    if any(wrapper.get('prompt', True) for wrapper in wrapped):
        for node in dicts_in(cfg.get('optim_wrapper')):
            if 'optimizer' in node:
                done += _set_constructor(node)
    return done


def _set_constructor(node: dict) -> list[str]:
    """Sets the constructor of one optimizer, where prompts need another than MMEngine's."""
    paramwise = node.get('paramwise_cfg') or {}
    if not paramwise.get('custom_keys') and 'prompts' not in paramwise and all(
            value == 1 for value in PROMPT_MULTIPLIERS.values()):
        return []
    name = type_name(node.get('constructor'))
    if name in ('', 'DefaultOptimWrapperConstructor'):
        node['constructor'] = CONSTRUCTOR
        return [f'optim_wrapper.constructor={CONSTRUCTOR!r} is set: multipliers for the backbone '
                'are not for its prompts, which train at the rate of the head']
    if name == type_name(CONSTRUCTOR):
        return []
    if 'prompts' in paramwise:
        raise LaunchError(f'optim_wrapper.paramwise_cfg.prompts={paramwise["prompts"]!r} is for '
                          f'optim_wrapper.constructor={CONSTRUCTOR!r}, got {name!r}')
    return [f'optim_wrapper.constructor={name!r} is kept: it decides about the rate of prompts']


def _drop_layer_decay(node: dict) -> list[str]:
    """Replaces a constructor with layer-wise rates by MMEngine's default one."""
    name = type_name(node['constructor'])
    old = node.get('paramwise_cfg') or {}
    if name in DETECTION_DECAY:
        # They do not decay biases and one-dimensional parameters, and read nothing else.
        new = dict(norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.)
        if (node.get('optimizer') or {}).get('weight_decay') is None:
            new = {}
    elif name == CLASSIFICATION_DECAY:
        kept = ('bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult')
        new = {key: old[key] for key in kept if old.get(key) is not None}
        # It takes no rate from custom keys, the default constructor would.
        custom = {key: {k: v for k, v in mult.items() if k != 'lr_mult'}
                  for key, mult in (old.get('custom_keys') or {}).items()}
        if custom:
            new['custom_keys'] = custom
    else:
        return []
    if 'prompts' in old:
        new['prompts'] = old['prompts']
    if new:  # heads may share layers (RTMDet's do), whose parameters the default one takes twice
        new['bypass_duplicate'] = True
    del node['constructor']
    node['paramwise_cfg'] = new
    return [f'optim_wrapper.constructor={name!r} is replaced by the default one, with '
            f'paramwise_cfg={new}: rates that fall with the depth are for a backbone that trains. '
            "Prompts, head and what else trains get the optimizer's rate"]
