"""What a checkpoint says of itself and of the model that it belongs to."""
from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from mmprotune.config_nodes import training_patterns
from mmprotune.errors import UnreadableCheckpoint
from mmprotune.version import __version__

from .reading import read, state_dict_of
from .slim import FINGERPRINT, hex_of, prompted_parts, training_names


def describe_model(model: nn.Module) -> dict:
    """What a slim checkpoint says of the model it belongs to, for its ``meta``.

    Args:
        model (nn.Module): A model that holds prompted backbones.

    Returns:
        dict: Plain types only.
    """
    backbones = {}
    for path, part in prompted_parts(model):
        frozen = part.frozen_tensors()
        backbones[path] = dict(
            type=type(part.backbone).__name__,
            fingerprint=hex_of(part.frozen_fingerprint),
            frozen_tensors=len(frozen),
            frozen_bytes=sum(t.numel() * t.element_size() for t in frozen.values()),
            last_stage=part.last_stage,
            pretrained=getattr(part, 'frozen_source', None),
            frozen_from=getattr(part, 'frozen_from', None),
            trains=training_names(part),
            stages=[
                dict(name=s.name, path=s.path, channels=s.channels, stride=float(s.stride))
                for s in part.stages
            ])
    return dict(version=__version__, torch_version=str(torch.__version__), backbones=backbones)


def _known(meta: dict) -> dict:
    """What :func:`describe_model` wrote, down to the types; a stranger may have written it."""
    version = meta.get('version')
    backbones = {
        str(path): dict(
            type=str(b['type']),
            fingerprint=str(b['fingerprint']),
            frozen_tensors=int(b['frozen_tensors']),
            frozen_bytes=int(b['frozen_bytes']),
            last_stage=str(b['last_stage']),
            **{key: None if b.get(key) is None else str(b[key])
               for key in ('pretrained', 'frozen_from')},
            trains=[str(name) for name in b.get('trains') or ()],
            stages=[
                dict(name=str(s['name']), path=str(s['path']), channels=int(s['channels']),
                     stride=float(s['stride'])) for s in b['stages']
            ])
        for path, b in meta.get('backbones', {}).items()}
    return dict(version=None if version is None else str(version), backbones=backbones)


def _backbones_of(checkpoint: Any) -> dict:
    """What the meta of a checkpoint says of its backbones; empty where it is of no use."""
    try:
        return _known(checkpoint['meta']['mmprotune'])['backbones']
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return {}


def frozen_origins(path: str | os.PathLike) -> dict[str, tuple[str, list[str]]]:
    """What the ``frozen_from`` of the backbones was that a checkpoint file was trained on.

    Args:
        path (str | os.PathLike): Local file.

    Returns:
        dict[str, tuple[str, list[str]]]: By the backbone's place in the model: the file it was
        filled from, and its parameters that train. Only backbones that were.

    Raises:
        UnreadableCheckpoint: It cannot be read.
    """
    return {place: (known['frozen_from'], known['trains'])
            for place, known in _backbones_of(read(path)).items()
            if known['frozen_from'] is not None}


def origin_hint(model: nn.Module, checkpoint: Any) -> str:
    """Names the files whose frozen backbones a checkpoint needs, where the model has others.

    Args:
        model (nn.Module): A model that holds prompted backbones.
        checkpoint: A whole checkpoint; any part of its meta may be missing.

    Returns:
        str: To be put behind an error; '' where the backbones are the right ones, or the
        checkpoint does not say what it was trained on.
    """
    backbones, hints = _backbones_of(checkpoint), []
    for path, part in prompted_parts(model):
        known = backbones.get(path)
        if known is None or known['fingerprint'] == hex_of(part.frozen_fingerprint):
            continue
        key = key_of(path)
        own, source = getattr(part, 'frozen_from', None), known['frozen_from']
        if source is None and known['pretrained'] is None:
            continue
        hint = f"it was trained on the backbone of {source or known['pretrained']}"
        if source is not None and own != source:
            hint += f': set {key}.frozen_from={source}'
            more = training_patterns(dict(trainable=part.trainable), known['trains'])
            if len(more) > len(part.trainable):
                hint += f' and {key}.trainable={more}'
        elif source is not None:
            hint += ', which this one is filled from too: the file holds other weights than then'
        elif own is not None:
            hint += f', and this one is filled from {own}: leave {key}.frozen_from out'
        hints.append(hint)
    return ''.join(f'; {hint}' for hint in dict.fromkeys(hints))


def key_of(path: str) -> str:
    """The config key of a prompted backbone."""
    return f'model.{path}' if path else 'model'


def inspect(path: str | os.PathLike) -> dict:
    """Says what a checkpoint holds, without a model.

    Args:
        path (str | os.PathLike): Local file.

    Returns:
        dict: ``path``, ``bytes``, ``kind`` ('slim', 'full' or 'stock'), ``tensors``,
        ``parameters`` and tensor counts per group, ``meta``, and ``backbones`` where known.
    """
    path = os.fspath(path)
    checkpoint = read(path)
    state_dict = state_dict_of(checkpoint, path)
    roots = [k[:-len(FINGERPRINT)] for k in state_dict if k.rpartition('.')[2] == FINGERPRINT]
    meta = checkpoint.get('meta', {}) if 'state_dict' in checkpoint else {}
    meta = meta if isinstance(meta, dict) else {}
    try:
        known = _known(meta.get('mmprotune', {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableCheckpoint(f"{path}: meta['mmprotune'] in it is malformed: "
                                   f'{type(error).__name__}: {error}') from error
    groups: dict[str, list[int]] = {}
    for key, tensor in state_dict.items():
        root = next((r for r in roots if key.startswith(r)), None)
        group = key.split('.')[0] if root is None else root + key[len(root):].split('.')[0]
        count = groups.setdefault(group, [0, 0, 0])
        count[0] += 1
        count[1] += tensor.numel()
        count[2] += tensor.numel() * tensor.element_size()
    declared = sum(b['frozen_tensors'] for b in known['backbones'].values())
    inside = sum(k.startswith(tuple(r + 'backbone.' for r in roots)) for k in state_dict) \
        if roots else 0
    kind = 'stock' if not roots else 'full' if declared and inside >= declared else 'slim'
    return dict(
        path=path,
        bytes=os.path.getsize(path),
        kind=kind,
        tensors=len(state_dict),
        values=sum(t.numel() for t in state_dict.values()),
        groups={g: dict(tensors=c[0], values=c[1], bytes=c[2]) for g, c in groups.items()},
        fingerprints={r.rstrip('.'): hex_of(state_dict[r + FINGERPRINT]) for r in roots},
        backbones=known['backbones'],
        version=known['version'],
        epoch=meta['epoch'] if isinstance(meta.get('epoch'), int) else None,
        iter=meta['iter'] if isinstance(meta.get('iter'), int) else None,
        resumable='optimizer' in checkpoint)
