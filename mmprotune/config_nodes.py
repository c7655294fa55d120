"""Looking through configs: nested dicts and lists whose types are names, or classes themselves.

Nothing is built here but data sets, which say what their classes are.
"""
from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

_LOADERS = ('test_dataloader', 'val_dataloader', 'train_dataloader')
# Where backbones name their files, besides `init_cfg`.
FILE_KEYS = ('pretrained', 'checkpoint_path')


def type_name(node: object) -> str:
    """The bare name of a type: 'ResNet' for 'mmdet.ResNet', for the class, and for a config of it.

    Args:
        node (object): A config dict, the value of its ``type``, or None.

    Returns:
        str: The name without scope or module; '' where there is no type.
    """
    kind = node.get('type') if isinstance(node, dict) else node
    if kind is None:
        return ''
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def nodes_in(node: object, path: str = '') -> Iterator[tuple[str, dict]]:
    """Every dict inside nested dicts, lists and tuples with its dotted path, outermost first."""
    if isinstance(node, dict):
        yield path, node
        items = list(node.items())
    else:
        items = list(enumerate(node)) if isinstance(node, (list, tuple)) else []
    for key, child in items:
        yield from nodes_in(child, f'{path}.{key}' if path else str(key))


def dicts_in(node: object) -> Iterator[dict]:
    """Every dict inside nested dicts, lists and tuples, outermost first."""
    return (found for _, found in nodes_in(node))


def file_of(init_cfg: object) -> str | None:
    """The file that an ``init_cfg`` (a dict or a list of them) loads; None where it loads none."""
    if isinstance(init_cfg, (list, tuple)):
        return next(filter(None, map(file_of, init_cfg)), None)
    # PVT's have no type.
    loads = isinstance(init_cfg, dict) and type_name(init_cfg) in ('Pretrained', 'PretrainedInit',
                                                                   '')
    return str(init_cfg['checkpoint']) if loads and init_cfg.get('checkpoint') else None


def file_inside(node: object) -> str | None:
    """The first pre-trained file that a config names anywhere inside."""
    return next(filter(None, (
        file_of(found.get('init_cfg')) or next(
            (str(found[key]) for key in FILE_KEYS if found.get(key)), None)
        for found in dicts_in(node))), None)


def find_backbones(model: object) -> list[tuple[str, list[dict]]]:
    """The backbones in the config of a model, wherever they are.

    Args:
        model (object): Config of a model.

    Returns:
        list[tuple[str, list[dict]]]: For each, its dotted path (a list's items are numbered) and
        the dicts around it, outermost first; the last one has it under the key ``backbone``.
        What a backbone itself holds is not looked at.
    """
    found = []

    def visit(node: object, path: str, around: list[dict]) -> None:
        if isinstance(node, dict):
            around = [*around, node]
            for key, child in node.items():
                inner = f'{path}.{key}' if path else str(key)
                if key == 'backbone' and isinstance(child, dict) and 'type' in child:
                    found.append((inner, around))
                else:
                    visit(child, inner, around)
        elif isinstance(node, (list, tuple)):
            for i, child in enumerate(node):
                visit(child, f'{path}.{i}', around)

    visit(model, '', [])
    return found


def prompted_nodes(model: Any) -> list[tuple[str, dict]]:
    """The dicts of prompted backbones in a model's config, with their dotted paths.

    Args:
        model: ``cfg.model``, or None.

    Returns:
        list[tuple[str, dict]]: The dicts themselves, wherever nested.
    """
    return [(path, node) for path, node in nodes_in(model)
            if type_name(node) == 'PromptedBackbone']


def node_of(path: str, nodes: list[tuple[str, dict]]) -> dict | None:
    """The dict that a module was built from.

    Args:
        path (str): Dotted path of the module in the model.
        nodes (list[tuple[str, dict]]): Of :func:`prompted_nodes`.

    Returns:
        dict, optional: The one at the same path, else the only one there is: models that build a
        part of theirs twice have one dict for two modules.
    """
    same = [node for at, node in nodes if at == path]
    return same[0] if same else nodes[0][1] if len(nodes) == 1 else None


def training_patterns(node: dict, names: list[str]) -> list[str]:
    """What ``trainable`` must say so that exactly these parameters of a backbone train.

    Args:
        node (dict): Config of the prompted backbone; its own patterns are kept.
        names (list[str]): Dotted names of the backbone's parameters that train.
    """
    patterns = list(node.get('trainable') or ())
    return patterns + [re.escape(name) for name in names
                       if not any(re.fullmatch(pattern, name) for pattern in patterns)]


def pull_in_files(model: Any) -> list[str]:
    """Moves pre-trained files to the backbones that they are of.

    A prompted backbone hands its own ``init_cfg``, and the model's ``pretrained``, on to the
    backbone in it; but mmdet's ``init_detector``, mmseg's ``init_model`` and MMEngine's
    inferencers delete both.

    Args:
        model: ``cfg.model``; changed in place.

    Returns:
        list[str]: What was moved: config keys, old and new.
    """
    moved = []
    for path, node in nodes_in(model):
        inner = node.get('backbone')
        if not isinstance(inner, dict):
            continue
        old = new = f'model.{path}' if path else 'model'
        # The order of precedence is that of PromptedBackbone itself.
        if type_name(node) == 'PromptedBackbone' and node.get('init_cfg') is not None:
            init_cfg, old = node.pop('init_cfg'), f'{old}.init_cfg'
            ignored = bool(node.get('pretrained'))
        elif type_name(inner) == 'PromptedBackbone' and isinstance(node.get('pretrained'), str):
            init_cfg = dict(type='Pretrained', checkpoint=node.pop('pretrained'))
            inner, old, new, ignored = inner['backbone'], f'{old}.pretrained', f'{new}.backbone', \
                False
        else:
            continue
        if not ignored and file_of(inner.get('init_cfg')) is None and not any(
                inner.get(key) for key in FILE_KEYS):
            inner.pop('pretrained', None)
            inner['init_cfg'] = init_cfg
        moved.append(f'{old} to {new}.backbone.init_cfg')
    return moved


def without_pretrained(cfg: Config) -> Config:
    """A copy of a config whose model builds without any weight file.

    Drops every ``init_cfg`` of type Pretrained, every ``pretrained`` (False for timm's models),
    ``checkpoint_path`` and ``frozen_from``; a ``PromptedBackbone`` gets ``freeze='all'``, as there
    is no file left that could say what is to be frozen.

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
        if type_name(node) == 'TIMMBackbone':  # mmseg's downloads unless told not to
            node['pretrained'] = False
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, (list, tuple)):
            node['init_cfg'] = [one for one in init_cfg if file_of(one) is None]
        elif file_of(init_cfg) is not None:
            del node['init_cfg']
    return cfg


def parse_config(text: str) -> Config:
    """Reads what MMEngine wrote of a config, without running it.

    Args:
        text (str): ``Config.pretty_text``: assignments of plain values, and of ``dict(…)`` of them.

    Raises:
        ValueError: It holds anything else; says what and where.
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {value(key): value(item) for key, item in zip(node.keys, node.values)}
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            kind = dict(List=list, Tuple=tuple, Set=set)[type(node).__name__]
            return kind(value(item) for item in node.elts)
        if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict' and all(
                word.arg for word in node.keywords) and (not node.args or (
                    len(node.args) == 1 and isinstance(node.args[0], ast.Dict))):
            found = value(node.args[0]) if node.args else {}
            return {**found, **{word.arg: value(word.value) for word in node.keywords}}
        if isinstance(node, ast.Name) and node.id in ('inf', 'nan'):
            return float(node.id)
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise ValueError(f'line {node.lineno}: expected plain values, got '
                             f'{ast.unparse(node)[:60]!r}') from None

    try:
        tree = ast.parse(text)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f'no Python: {error}') from None
    found = {}
    for step in tree.body:
        if not isinstance(step, ast.Assign) or not isinstance(step.targets[0], ast.Name):
            raise ValueError(f'line {step.lineno}: expected an assignment, got '
                             f'{ast.unparse(step)[:60]!r}')
        found[step.targets[0].id] = value(step.value)
    return Config(found)


# --- data sets -------------------------------------------------------------------------------


def class_names(cfg: Config) -> dict[str, list[str]]:
    """Class names of the data sets that a config names, where it or their classes tell them.

    No annotation file is read: a set that takes its classes from there is left out.

    Args:
        cfg (Config): Of a whole run; the default scope is set.

    Returns:
        dict[str, list[str]]: Names in order, by the config key of the set.
    """
    found = {}
    for key in _LOADERS:
        for path, node in nodes_in((cfg.get(key) or {}).get('dataset'), f'{key}.dataset'):
            leaf = path.split('.')
            # Wrappers hold one set or several; other dicts in a set (pipelines) are no sets.
            inner = [part for part in leaf[2:] if not part.isdigit()]
            if set(inner) - {'dataset', 'datasets'} or 'type' not in node or \
                    'dataset' in node or 'datasets' in node:
                continue
            names = _classes_of(node)
            if names is not None:
                found[path] = names
    return found


def _classes_of(node: dict) -> list[str] | None:
    from .registry import DATASETS
    node = copy.deepcopy(dict(node))
    try:
        # Constructors may have defaults of their own. Those that look at files may fail here.
        dataset = DATASETS.build(dict(node, pipeline=[], lazy_init=True))
        names = dataset.metainfo.get('classes')
    except Exception:
        names = (node.get('metainfo') or {}).get('classes', node.get('classes'))
    if not isinstance(names, (list, tuple)) or not names:
        return None
    return [str(name) for name in names]
