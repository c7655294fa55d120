"""Checks of checkpoints against a config; slim ones of full ones, and back."""
from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from mmprotune.config_nodes import (
    class_names,
    node_of,
    parse_config,
    prompted_nodes,
    training_patterns,
    without_pretrained,
)
from mmprotune.errors import CheckpointError, FingerprintMismatch

from . import writing
from .loading import full_state_dict, load
from .meta import describe_model, inspect, key_of
from .plain import to_plain
from .slim import FINGERPRINT, FUNCTION, prompted_parts, short, training_names


def verify(path: str | os.PathLike, cfg: Config | str | os.PathLike) -> dict:
    """Checks a checkpoint against a config: fingerprint, keys, shapes, finite values, classes.

    The names of the classes are compared, in their order, with those of the config's data sets,
    where both are known without reading annotation files.

    Args:
        path (str | os.PathLike): Slim or full prompted checkpoint.
        cfg (Config | str | os.PathLike): Config, or its file.

    Returns:
        dict: As :func:`inspect`.

    Raises:
        CheckpointError: It does not belong to the config's model.
    """
    info = inspect(path)
    if info['kind'] == 'stock':
        raise CheckpointError(f'{info["path"]} is a stock checkpoint: expected a prompted one')
    cfg = _config(cfg)
    _check_classes(load(build_model(cfg), path), cfg, info['path'])
    return info


def _check_classes(checkpoint: dict, cfg: Config, path: str) -> None:
    meta = checkpoint.get('meta') if 'state_dict' in checkpoint else None
    dataset_meta = meta.get('dataset_meta') if isinstance(meta, dict) else None
    trained = dataset_meta.get('classes') if isinstance(dataset_meta, dict) else None
    if not isinstance(trained, (list, tuple)):
        return
    trained = [str(name) for name in trained]
    for key, names in class_names(cfg).items():
        if names == trained:
            continue
        if sorted(names) == sorted(trained):
            what = 'the same classes in another order'
        elif len(names) != len(trained):
            what = f'{len(trained)} classes, the config has {len(names)}'
        else:
            what = 'other classes'
        at = next((i for i, (a, b) in enumerate(zip(trained, names)) if a != b),
                  min(len(trained), len(names)))
        raise CheckpointError(
            f'{path}: it was trained with {what}. From number {at} on: '
            f'expected {_in_order(trained[at:])}, got {_in_order(names[at:])} in {key}.metainfo')


def _in_order(names: list[str], most: int = 3) -> str:
    return (', '.join(names[:most]) or 'none') + (', …' if len(names) > most else '')


def extract(path: str | os.PathLike, cfg: Config | str | os.PathLike, out: str | os.PathLike,
            force: bool = False, prompts_only: bool = False) -> dict:
    """Makes a slim checkpoint of a full one (prompted or stock), or of a run's slim one.

    The optimizer, and what else only resuming needs, is left out.

    Args:
        path (str | os.PathLike): Checkpoint.
        cfg (Config | str | os.PathLike): Config of the prompted model, or its file.
        out (str | os.PathLike): Where to write.
        force (bool): Whether an existing ``out`` is replaced. Defaults to False.
        prompts_only (bool): Whether necks and heads are left out as well: what stays is what
            trained inside the prompted backbones. Defaults to False.

    Returns:
        dict: :func:`inspect` of the new file.

    Raises:
        CheckpointError: It does not fit, or its backbone is not the one that the config's
            pre-trained file holds (no one could load the slim file).
        FileExistsError: ``out`` exists.
    """
    out = _writable(out, path, force)
    cfg = _config(cfg)
    model = build_model(cfg)
    before = {p: part.frozen_fingerprint.clone() for p, part in prompted_parts(model)}
    checkpoint = load(model, path)
    for place, part in prompted_parts(model):
        if part.freeze == 'pretrained' and not torch.equal(before[place], part.frozen_fingerprint):
            raise FingerprintMismatch(
                f"{os.fspath(path)}: its backbone is not the one of the config's pre-trained file: "
                f'expected fingerprint {short(before[place])}, got '
                f'{short(part.frozen_fingerprint)}; a slim file of it could not be used. '
                f'With {key_of(place)}.frozen_from={os.path.abspath(path)} it can')
    state_dict = model.state_dict()
    if prompts_only:
        places = tuple(f'{place}.' if place else '' for place, _ in prompted_parts(model))
        state_dict = {key: tensor for key, tensor in state_dict.items() if key.startswith(places)}
    writing.write(_rewritten(checkpoint, state_dict, describe_model(model), cfg), out)
    return inspect(out)


def merge(path: str | os.PathLike, cfg: Config | str | os.PathLike, out: str | os.PathLike,
          force: bool = False) -> dict:
    """Makes a full checkpoint of a slim one.

    Where a backbone has no prompts, its keys are those of the stock model, which loads the file
    as it is; else those of the prompted model. The config in the new file's meta needs no
    pre-trained file.

    Args:
        path (str | os.PathLike): Slim checkpoint.
        cfg (Config | str | os.PathLike): Its config, or the config's file.
        out (str | os.PathLike): Where to write.
        force (bool): Whether an existing ``out`` is replaced. Defaults to False.

    Returns:
        dict: :func:`inspect` of the new file.

    Raises:
        CheckpointError: The checkpoint does not belong to the config's model.
        FileExistsError: ``out`` exists.
    """
    out = _writable(out, path, force)
    cfg = _config(cfg)
    model = build_model(cfg)
    checkpoint = load(model, path)
    for _, part in prompted_parts(model):
        if not len(part.prompts):
            part.unwrap()  # a stock model has no weights in 8 bits
    state_dict = full_state_dict(model)
    meta = describe_model(model)
    for place, part in prompted_parts(model):
        if len(part.prompts):
            continue
        prefix = f'{place}.' if place else ''
        for key in (FINGERPRINT, FUNCTION):
            state_dict.pop(prefix + key)
        meta['backbones'].pop(place)
        for key in [k for k in state_dict if k.startswith(f'{prefix}backbone.')]:
            state_dict[prefix + key[len(prefix) + len('backbone.'):]] = state_dict.pop(key)
    writing.write(_rewritten(checkpoint, state_dict, meta if meta['backbones'] else None,
                             _self_contained(cfg, model)), out)
    return inspect(out)


def _config(cfg: Config | str | os.PathLike) -> Config:
    return cfg if isinstance(cfg, Config) else Config.fromfile(os.fspath(cfg))


def build_model(cfg: Config | str | os.PathLike) -> nn.Module:
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    cfg = _config(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    node = cfg.model
    if node.get('data_preprocessor') is None and cfg.get('data_preprocessor'):
        node = {**node, 'data_preprocessor': cfg.data_preprocessor}  # as a Runner does
    model = revert_sync_batchnorm(MODELS.build(node))
    if not prompted_parts(model):
        raise CheckpointError('the config holds no PromptedBackbone: expected '
                              "model.backbone.type='mmprotune.PromptedBackbone'")
    return model.eval()


def _self_contained(cfg: Config, model: nn.Module) -> Config:
    """A config whose model builds without a pre-trained file, and freezes what ``model`` does."""
    cfg = without_pretrained(cfg)
    nodes = prompted_nodes(cfg.get('model'))
    for path, part in prompted_parts(model):
        node = node_of(path, nodes)
        if node is not None:
            node['trainable'] = training_patterns(node, training_names(part))
    return cfg


def _writable(out: str | os.PathLike, source: str | os.PathLike, force: bool) -> str:
    out = os.fspath(out)
    if out.endswith('.safetensors'):
        raise CheckpointError(f'{out}: expected a name that ends with .pth; a checkpoint holds '
                              'more than tensors, and safetensors files do not')
    if os.path.exists(out) and not force:
        raise FileExistsError(f'{out} exists; nothing was written (--force overwrites)')
    if os.path.abspath(out) == os.path.abspath(os.fspath(source)):
        raise CheckpointError(f'{out}: input and output are the same file')
    return out


def _rewritten(checkpoint: dict, state_dict: Mapping[str, Tensor], meta: dict | None,
               cfg: Config) -> dict:
    """A checkpoint for inference and fine-tuning: weights and meta, without optimizer state.

    Inferencers that get no config build the one in the meta, so it must be one for these weights.
    """
    old = checkpoint.get('meta', {}) if 'state_dict' in checkpoint else {}
    new = {k: v for k, v in to_plain(old).items() if k != 'mmprotune'}
    if meta is not None:
        new['mmprotune'] = meta
    new.pop('cfg', None)
    try:
        text = cfg.pretty_text  # of a class in place of a name it may be none, or one like `a.b.C`
        parse_config(text)
        new['cfg'] = text
    except (SyntaxError, ValueError):
        print_log('the config is left out of the meta: it holds objects that cannot be written',
                  logger='current', level=logging.WARNING)
    return dict(
        meta=new,
        state_dict=OrderedDict((k, v.detach().cpu().clone()) for k, v in state_dict.items()))
