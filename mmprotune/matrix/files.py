"""Which pre-trained file a stock config names, and the one that takes its place."""
from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

# Which of a config's keys names the pre-trained file of its backbone.
NO_FILE = 'none'


def nodes(node: object, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """Every dict inside nested dicts and lists with its path, outermost first."""
    if isinstance(node, dict):
        yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in list(items):
        if isinstance(child, (dict, list, tuple)):
            yield from nodes(child, (*path, key))


def _backbone(model: dict) -> dict | None:
    """The config of the backbone: ``model.backbone``, else the first one further in."""
    if isinstance(model.get('backbone'), dict):
        return model['backbone']
    return next((node for path, node in nodes(model) if path and path[-1] == 'backbone'), None)


def pretrained(node: dict) -> dict | None:
    """The part of a node's ``init_cfg`` that names a file; PVT's has no type."""
    init_cfg = node.get('init_cfg')
    parts = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    return next((p for p in parts
                 if isinstance(p, dict) and p.get('type', 'Pretrained') == 'Pretrained'), None)


def _file_node(backbone: dict) -> tuple[tuple, dict] | None:
    """The outermost dict in a backbone whose ``init_cfg`` names a file, and its path."""
    return next((found for found in nodes(backbone) if pretrained(found[1])), None)


def file_key(cfg: Config) -> str:
    """Which key of a config names the file that its backbone starts from.

    Args:
        cfg (Config): A stock config.

    Returns:
        str: 'init_cfg', 'pretrained' or 'checkpoint_path' of the backbone, 'backbone_cfg.init_cfg'
        or the like of a network inside it, 'model.pretrained', 'load_from', or ``NO_FILE``.
    """
    backbone = _backbone(cfg.model) or {}
    found = _file_node(backbone)
    if found:
        return '.'.join([*map(str, found[0]), 'init_cfg'])
    for key in ('checkpoint_path', 'pretrained'):
        if backbone.get(key):
            return key
    if cfg.model.get('pretrained'):
        return 'model.pretrained'
    return 'load_from' if cfg.get('load_from') else NO_FILE


def point(cfg: Config, original: Config, folder: Path) -> dict:
    """Lets a config name the files in ``folder`` where the original one names its own.

    Args:
        cfg (Config): Of :func:`~mmprotune.matrix.configs.runnable`; changed in place.
        original (Config): The stock config.
        folder (Path): Holds the files that :func:`~mmprotune.matrix.stock.check_stock` wrote.

    Returns:
        dict: Options for ``protune``: ``frozen_from`` where the original names no file.
    """
    backbone, was = _backbone(cfg.model), _backbone(original.model)
    if backbone is None:
        return {}
    options = {}
    key, file = file_key(original), str(folder / 'backbone.pth')
    if key.endswith('init_cfg'):
        node, (path, named) = backbone, _file_node(was)
        for part in path:
            node = node[part]
        node['init_cfg'] = copy.deepcopy(named['init_cfg'])
        pretrained(node)['checkpoint'] = file
    elif key in ('pretrained', 'checkpoint_path'):
        if 'TIMM' in str(backbone['type']):
            key = 'checkpoint_path'  # pretrained=True asks timm to download
        backbone[key] = file
    elif key == 'model.pretrained':
        cfg.model['pretrained'] = file
    elif key == NO_FILE:
        options['frozen_from'] = file  # which backbones take that forbid an init_cfg, too
    if original.get('load_from'):
        cfg.load_from = str(folder / 'model.pth')
    # The files hold the names of the class itself, not those of another library's weights.
    for path, node in nodes(cfg.model):
        if 'convert_weights' in node or path and path[-1] == 'backbone' and _converts(node):
            node['convert_weights'] = False
    return options


def _converts(backbone: dict) -> bool:
    cls = MODELS.get(str(backbone.get('type')))
    return cls is not None and 'convert_weights' in inspect.signature(cls.__init__).parameters


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """The first submodule of that name, at any depth."""
    return next((m for n, m in model.named_modules() if n.rpartition('.')[2] == name), None)


def write_files(model: nn.Module, original: Config, folder: Path) -> None:
    """Writes the weights of a stock model where a run's config will look.

    Args:
        model (nn.Module): The stock model.
        original (Config): Its config.
        folder (Path): Where to.
    """
    backbone = submodule(model, 'backbone')
    if backbone is None:
        return
    path, node = _file_node(_backbone(original.model) or {}) or ((), {})
    if path:  # the file is that of a network inside
        backbone = submodule(backbone, path[-1].replace('_cfg', ''))
    state = backbone.state_dict()
    prefix = (pretrained(node) or {}).get('prefix') or ''
    # Loaders differ in the names they look for; the file has all of them.
    prefixes = {'', 'backbone.', prefix.rstrip('.') + '.' if prefix else ''}
    if 'TIMM' in type(backbone).__name__ and file_key(original) != NO_FILE:
        # timm loads into its own model, and strictly.
        state, prefixes = {k.partition('.')[2]: v for k, v in state.items()}, {''}
    torch.save({p + k: v for p in sorted(prefixes) for k, v in state.items()},
               folder / 'backbone.pth')
    if original.get('load_from'):
        torch.save(dict(state_dict=model.state_dict()), folder / 'model.pth')
