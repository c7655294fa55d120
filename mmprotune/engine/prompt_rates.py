"""The rate at which prompts train: the head's, whatever a config says about its backbone."""
from __future__ import annotations

from mmengine.config import Config

from mmprotune.config_nodes import dicts_in, find_backbones, type_name

# Their rates fall with a layer's depth in the backbone, which they read off parameter names.
DETECTION_DECAY = ('LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor')
CLASSIFICATION_DECAY = 'LearningRateDecayOptimWrapperConstructor'


def set_prompt_rates(cfg: Config) -> list[str]:
    """Gives prompts the head's learning rate and weight decay, in every optimizer of a config.

    * A multiplier for the backbone was found for weights that train. Prompts are named
      ``backbone.prompts.…`` and would inherit it, so a longer key of ``custom_keys``, which
      MMEngine prefers, puts them back: the settings of the user's own key for prompts, else the
      multipliers of what is around the backbone, else 1. Nothing is added where nothing would be
      inherited, as a custom key also switches off ``norm_decay_mult`` and its like.
    * A constructor that lets rates fall with the depth has nothing to do in a frozen backbone, and
      cannot read the names in a wrapped one: MMEngine's default constructor takes its place, with
      the weight decay that it would have set.

    Args:
        cfg (Config): The config; changed in place. Without a ``PromptedBackbone`` it stays.

    Returns:
        list[str]: What was done, a sentence each.
    """
    wrapped = {path: around[-1]['backbone'] for path, around in find_backbones(cfg.get('model'))
               if type_name(around[-1]['backbone']) == 'PromptedBackbone'}
    if not wrapped:
        return []
    prompted = [path for path, wrapper in wrapped.items() if wrapper.get('prompt', True)]
    done = []
    for node in dicts_in(cfg.get('optim_wrapper')):
        if 'constructor' in node:
            done += _drop_layer_decay(node)
    for node in dicts_in(cfg.get('optim_wrapper')):
        keys = (node.get('paramwise_cfg') or {}).get('custom_keys')
        if keys:
            for path in _parameter_paths(prompted, cfg.model):
                done += _set_keys(keys, path, (node.get('optimizer') or {}).get('weight_decay'))
    return done


def _parameter_paths(prompted: list[str], model: dict) -> list[str]:
    """The wrappers' dotted paths in the model itself, which parameter names begin with."""
    paths = []
    for path in prompted:
        first, _, rest = path.partition('.')
        # A semi-supervised detector builds one config twice; its teacher is not trained.
        semi = first == 'detector' and 'semi_train_cfg' in model
        paths.append(f'student.{rest}' if semi else path)
    return paths


def _set_keys(keys: dict, path: str, weight_decay: float | None) -> list[str]:
    """Adds what one wrapper's prompts need to ``custom_keys``."""
    parent = path.rpartition('.')[0] + '.' if '.' in path else ''
    inherited = [key for key, mult in keys.items()
                 if key in f'{path}.' and key not in parent and _differs(mult)]
    if not inherited:
        return []
    around = max((key for key in keys if parent and key in parent), key=len, default=None)
    plain = dict(lr_mult=1.)
    if weight_decay is not None:  # MMEngine refuses multipliers of what is not there
        plain['decay_mult'] = 1.
    wanted = {f'{path}.prompts': plain if around is None else dict(keys[around])}
    # MMEngine goes by length: the user's 'prompts' would lose against 'backbone'.
    for key in sorted((key for key in keys if 'prompts' in key), key=len):
        if key in f'{path}.{key[key.index("prompts"):]}':
            wanted[f'{path}.{key[key.index("prompts"):]}'] = dict(keys[key])
    done = []
    for key, mult in wanted.items():
        if key not in keys:
            keys[key] = mult
            done.append(f'optim_wrapper.paramwise_cfg.custom_keys: prompts would inherit '
                        f'{dict(keys[max(inherited, key=len)])} of {max(inherited, key=len)!r}; '
                        f'added {key!r}: {mult}')
    return done


def _differs(mult: dict) -> bool:
    """Whether a custom key changes anything."""
    return any(value != 1 for value in mult.values())


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
    del node['constructor']
    node['paramwise_cfg'] = new
    return [f'optim_wrapper.constructor={name!r} is replaced by the default one, with '
            f'paramwise_cfg={new}: rates that fall with the depth are for a backbone that trains. '
            "Prompts, head and what else trains get the optimizer's rate"]
