"""Ways to fine-tune a backbone, as files: what of it trains, and what is put into it."""
from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mmcv.cnn import is_norm
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmprotune.config_nodes import dicts_in, find_backbones, type_name, without_pretrained
from mmprotune.engine.config import CLASSIFICATION_DECAY, DETECTION_DECAY, protune, set_prompt_rates
from mmprotune.errors import LaunchError, listed
from mmprotune.models.insertion import find_places

KEYS = ('backbone', 'inner', 'trains', 'lr_scale')
PARTS = ('norms', 'biases', 'first_stage', 'last_stage')


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        name (str): The stem of its file.
        backbone (dict, optional): Config of what is put around the backbone, without that; None
            leaves the model as it is.
        inner (str): The key of ``backbone`` that takes the backbone.
        trains (str, optional): Which of the backbone's own parameters train beside: one of
            ``PARTS``.
        lr_scale (float): Learning rates of this method relative to the others'.
        options (dict): Merged into the config of the run.
    """
    name: str
    backbone: dict | None
    inner: str = 'backbone'
    trains: str | None = None
    lr_scale: float = 1.
    options: dict = field(default_factory=dict)

    def content(self) -> dict:
        """What results with this method depend on; rates are told with each result."""
        return dict(backbone=self.backbone, inner=self.inner, trains=self.trains,
                    options=self.options)


def read_method(name: str, folder: Path) -> Method:
    """Reads a method's file: a config with ``backbone``, and what else :class:`Method` has.

    Any other key is merged into the configs of the runs, ``optim_wrapper.paramwise_cfg`` say.

    Args:
        name (str): A name in ``folder``, or the path of a file.
        folder (Path): Holds a file a method, ``NAME.py``.

    Returns:
        Method: The method.

    Raises:
        LaunchError: There is no such method, or a key is wrong.
    """
    path = Path(name) if name.endswith('.py') else folder / f'{name}.py'
    if not path.is_file():
        known = ', '.join(sorted(file.stem for file in folder.glob('*.py')))
        raise LaunchError(f'--methods: no method {name!r}; known are {known}, and files of your '
                          'own, PATH.py')
    try:
        content = Config.fromfile(str(path)).to_dict()
    except Exception as error:  # whatever Python raises, which may not name the file
        raise LaunchError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    backbone = content.get('backbone')
    if 'backbone' not in content or not (
            backbone is None or isinstance(backbone, dict) and backbone.get('type')):
        raise LaunchError(f'{path}: backbone must be None (full fine-tuning) or a dict with the '
                          f'key type, got {content.get("backbone", "no such key")!r}')
    found = {key: content.pop(key) for key in KEYS if key in content}
    method = Method(path.stem, options=content, **found)
    if method.trains not in (None, *PARTS):
        raise LaunchError(f'{path}: trains must be one of {", ".join(PARTS)}, '
                          f'got {method.trains!r}')
    if method.trains and type_name(backbone) != 'PromptedBackbone':
        raise LaunchError(f'{path}: trains={method.trains!r} needs a backbone of type '
                          f'mmprotune.PromptedBackbone, got {backbone!r}')
    if not isinstance(method.lr_scale, (int, float)) or not method.lr_scale > 0:
        raise LaunchError(f'{path}: lr_scale must be a positive number, got {method.lr_scale!r}')
    return method


def apply_method(cfg: Config, method: Method) -> Config:
    """Makes a config of full fine-tuning one of another method.

    Args:
        cfg (Config): The config; changed in place.
        method (Method): The method.

    Returns:
        Config: ``cfg``.

    Raises:
        LaunchError: The method does not fit the backbone.
    """
    cfg.merge_from_dict(copy.deepcopy(method.options))
    if method.backbone is None:
        _check_rates(cfg, method)
        return cfg
    options = copy.deepcopy(method.backbone)
    kind = options.pop('type')
    if type_name(kind) == 'PromptedBackbone':
        options.setdefault('insert', 'stages')  # its own default, whatever the library
        if method.trains:
            names = parts_of(_bare_backbone(cfg), method.trains, method.name)
            options['trainable'] = [*options.get('trainable', ()), *map(re.escape, names)]
        return _protune(cfg, method, **options)
    if cfg.get('load_from'):
        raise LaunchError(f'{method.name}: load_from={cfg.load_from!r} is a checkpoint of the '
                          f'model without {type_name(kind)}, whose names do not fit; name the '
                          "file in the backbone's init_cfg")
    if type_name(kind) == 'LoRAModel':
        _check_targets(_bare_backbone(cfg), options.get('targets') or (), method.name)
    hooks = cfg.get('custom_hooks')
    _protune(cfg, method)  # which finds the backbone and its pre-trained file
    cfg.custom_hooks = hooks
    owner = find_backbones(cfg.model)[0][1][-1]
    owner['backbone'] = {'type': kind, method.inner: owner['backbone']['backbone'], **options}
    return cfg


def _protune(cfg: Config, method: Method, **options) -> Config:
    protune(cfg, **options)
    if 'optim_wrapper' in method.options:
        # With rates that fall with the depth went the method's custom keys, which they do not read.
        cfg.merge_from_dict(copy.deepcopy(dict(optim_wrapper=method.options['optim_wrapper'])))
        set_prompt_rates(cfg)
    return cfg


def _check_rates(cfg: Config, method: Method) -> None:
    """Constructors whose rates fall with the depth read no ``lr_mult``."""
    constructor = cfg.get('optim_wrapper', {}).get('constructor')
    if type_name(constructor) in (*DETECTION_DECAY, CLASSIFICATION_DECAY) and any(
            'lr_mult' in node for node in dicts_in(method.options.get('optim_wrapper'))):
        raise LaunchError(f'{method.name}: optim_wrapper.constructor={constructor!r} reads no '
                          'lr_mult of custom_keys: all rates would be as without this method')


def _bare_backbone(cfg: Config) -> nn.Module:
    """The config's own backbone, with random weights."""
    cfg = without_pretrained(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    return MODELS.build(find_backbones(cfg.model)[0][1][-1]['backbone'])


def parts_of(backbone: nn.Module, part: str, method: str) -> list[str]:
    """Names of parameters by the kind of module that they are in.

    Args:
        backbone (nn.Module): The backbone.
        part (str): One of ``PARTS``.
        method (str): Who asks, for messages.

    Returns:
        list[str]: Dotted names in the backbone.

    Raises:
        LaunchError: There is none.
    """
    if part in ('first_stage', 'last_stage'):
        names = _of_stage(backbone, part, method)
    else:
        names = [f'{path}.{name}' if path else name for path, module in backbone.named_modules()
                 for name, _ in module.named_parameters(recurse=False)
                 if (is_norm(module) if part == 'norms' else name.endswith('bias'))]
    if not names:
        raise LaunchError(f'{method}: {type(backbone).__name__} has no {part}')
    return names


def _of_stage(backbone: nn.Module, part: str, method: str) -> list[str]:
    """Parameters of the stem and the first stage, or of what comes behind the last one but one."""
    ends = list(dict.fromkeys(stage.path for stage in find_places(backbone, 'auto')[0]))
    if len(ends) < 2:
        raise LaunchError(f'{method}: {type(backbone).__name__} has one stage, {ends[0]}, which is '
                          'all of it')
    order = {path: place for place, (path, _) in enumerate(backbone.named_modules())}
    first = part == 'first_stage'
    border = max(place for path, place in order.items()
                 if _is_inside(path, ends[0 if first else -2]))
    return [name for name, _ in backbone.named_parameters()
            if (order.get(name.rpartition('.')[0], 0) <= border) == first]


def _is_inside(path: str, outer: str) -> bool:
    return f'{path}.'.startswith(f'{outer}.')


def _check_targets(backbone: nn.Module, targets: Iterable[dict], method: str) -> None:
    """LoRA adapts linear layers, chosen by regular expressions or the ends of their names."""
    linear = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    wanted = [target['type'] for target in targets]
    if not any(re.fullmatch(one, path) or path.endswith(one) for one in wanted for path in linear):
        raise LaunchError(f'{method}: adapts linear layers named {listed(wanted, show=repr)}, of '
                          f'which {type(backbone).__name__} has none (its linear layers: '
                          f'{listed(linear, 3)})')
