"""Slim prompt checkpoints: what a prompted model loads and saves.

A slim checkpoint leaves out the frozen tensors and carries a fingerprint of them per prompted
backbone. It is an ordinary MMEngine checkpoint otherwise. The fingerprint ties it to one frozen
backbone: on another one it does not load.
"""
from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from . import safe_io
from .frozen import fingerprint
from .frozen.fingerprint import OPTIONAL_BUFFERS
from .safe_io import CheckpointError, CheckpointNotWritten, UnreadableCheckpoint, read, register
from .version import __version__

__all__ = [
    'CheckpointError', 'CheckpointNotWritten', 'FingerprintMismatch', 'FunctionMismatch',
    'IncompleteCheckpoint',
    'NonFiniteCheckpoint', 'UnreadableCheckpoint', 'describe_model', 'extract', 'full_state_dict',
    'inspect', 'load', 'merge', 'newest', 'problems', 'prompted_parts', 'read', 'register',
    'verify'
]

FINGERPRINT = 'frozen_fingerprint'
FUNCTION = 'frozen_function'
# Rounding on another machine or in TF32 moves outputs less; what a setting changes, more.
FUNCTION_TOLERANCE = 0.005
ROUNDING = 1e-4


class FingerprintMismatch(CheckpointError):
    """The checkpoint was trained on another frozen backbone."""


class FunctionMismatch(FingerprintMismatch):
    """The checkpoint's weights fit, but were trained in a network that computes something else."""


class IncompleteCheckpoint(CheckpointError):
    """Keys are missing, left over, or of other shapes."""


class NonFiniteCheckpoint(CheckpointError):
    """Weights are NaN or infinite."""


def prompted_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The prompted backbones in a model, with their dotted paths."""
    return [(path, m) for path, m in model.named_modules() if FINGERPRINT in m._buffers]


def _hex(sha: Tensor) -> str:
    return bytes(int(byte) % 256 for byte in sha.flatten().tolist()).hex()


def _shown(names, most: int = 5) -> str:
    names = sorted(names)
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


# --- loading, as seen by one prompted backbone -----------------------------------------------


@dataclass
class _FullLoad:
    """A state dict that brings the frozen tensors too; ``fingerprint`` is the one it carries, and
    ``has_function`` whether it says what the network computes."""
    fingerprint: Tensor | None
    has_function: bool

    def verify(self, module: nn.Module) -> None:
        module.refresh_fingerprint()
        if not self.has_function:
            function = module.function_of()
            # Not for the sake of rounding: the same backbone gives the same file.
            if max(module.function_distance(function, module.frozen_function)) > ROUNDING or \
                    not module.frozen_function.any():
                module.frozen_function.copy_(function)
        if self.fingerprint is not None and not torch.equal(
                self.fingerprint.cpu(), module.frozen_fingerprint.cpu()):
            raise _torn(self.fingerprint, module.frozen_fingerprint)


def _torn(expected: Tensor, found: Tensor) -> FingerprintMismatch:
    return FingerprintMismatch(
        'the frozen tensors in the checkpoint do not match the fingerprint in it: expected '
        f'{_hex(expected)[:16]}…, got {_hex(found)[:16]}…; the file is damaged or was put together '
        'from two')


def _check_together(where: str, own: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> None:
    """Raises when the frozen tensors that came do not have the fingerprint that came with them."""
    incoming = {
        name: own.get(f'backbone.{name}', tensor).to(tensor)
        for name, tensor in frozen.items() if name.rpartition('.')[2] not in OPTIONAL_BUFFERS}
    found = fingerprint(incoming)
    if not torch.equal(own[FINGERPRINT].cpu(), found):
        error = _torn(own[FINGERPRINT], found)
        raise FingerprintMismatch(f'{where}: {error}')


def _check_function(where: str, module: nn.Module, found: Tensor, own: Tensor) -> None:
    """Raises where a network of the same weights computes something else."""
    if found.shape != own.shape:
        raise IncompleteCheckpoint(f'{where}: {FUNCTION}: expected {tuple(own.shape)}, '
                                   f'got {tuple(found.shape)}')
    plain, prompted = module.function_distance(found, own)
    # Stored in 16 bits, weights round.
    lowest = min((t.element_size() for t in module.frozen_tensors().values()
                  if t.is_floating_point()), default=4)
    tolerance = FUNCTION_TOLERANCE * (1 if lowest >= 4 else 6)
    if plain > tolerance:
        raise FunctionMismatch(
            f'{where}: the checkpoint has the weights of this backbone, but was trained with one '
            f'that computes something else (outputs differ by {plain:.2g} of their size): check '
            'what backbone sets besides its weights (strides, dilations, style, activations, …)')
    if prompted > tolerance:
        raise FunctionMismatch(
            f'{where}: the prompts in the checkpoint were trained to act in another way (outputs '
            f'differ by {prompted:.2g} of their size): check prompt, stages and last_stage; here '
            f'last_stage={module.last_stage!r}, stages={[s.path for s in module.stages]}')


def check_incoming(module: nn.Module, state_dict: dict[str, Tensor], prefix: str,
                   quiet: bool = False) -> None:
    """Checks a state dict before a prompted backbone loads it; called by the backbone.

    Three kinds come: slim (prompts and a fingerprint), full (the frozen tensors as well) and stock
    (the keys of the plain backbone, which are renamed in place). Each is checked to the last key,
    whatever the caller's ``strict``: a backbone that is half another one is never what was meant.

    Args:
        module (nn.Module): The prompted backbone.
        state_dict (dict[str, Tensor]): What is about to be loaded; renamed keys are changed in it.
        prefix (str): Prefix of the backbone's keys.
        quiet (bool): Whether to say nothing in the log. Defaults to False.

    Raises:
        FingerprintMismatch: A slim file of another frozen backbone.
        FunctionMismatch: One of a network that computes something else.
        IncompleteCheckpoint: Keys are missing or have other shapes.
    """
    own = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
    if not own:
        return
    where = f'{prefix[:-1] or "the model"} ({type(module.backbone).__name__})'
    inner = {n: t for n, t in module.backbone.state_dict().items() if isinstance(t, Tensor)}
    prompted = FINGERPRINT in own or any(
        k.startswith('prompts.') or k.partition('.')[2] in inner and k.startswith('backbone.')
        for k in own)
    if not prompted:
        matching = [k for k in own if k in inner]
        if not matching:
            return  # nothing of this backbone; the host reports missing and unexpected keys
        for key in matching:
            state_dict[f'{prefix}backbone.{key}'] = state_dict.pop(prefix + key)
            own[f'backbone.{key}'] = own.pop(key)
        # A stock file brings no prompts: they stay as they are, and are not missing.
        for key, tensor in module.prompts.state_dict().items():
            own[f'prompts.{key}'] = state_dict[f'{prefix}prompts.{key}'] = tensor
        own[FINGERPRINT] = state_dict[prefix + FINGERPRINT] = module.frozen_fingerprint
        if not quiet:
            print_log(f'{where}: a stock checkpoint fills the backbone, prompts keep their weights',
                      logger='current')
    function = own.get(FUNCTION)
    if function is None:
        state_dict[prefix + FUNCTION] = module.frozen_function
        if prompted and not quiet:
            print_log(f'{where}: the checkpoint is of an older version, which did not note what '
                      'the network computes: whether settings besides the weights (stages, '
                      'last_stage, prompt, strides, …) are those of its training is not checked',
                      logger='current', level=logging.WARNING)

    wanted = {f'backbone.{n}': t for n, t in inner.items()}
    wanted.update((f'prompts.{n}', t) for n, t in module.prompts.state_dict().items())
    frozen = {f'backbone.{n}' for n in module.frozen_names if f'backbone.{n}' in wanted}
    full = any(k in own for k in frozen)
    if not full:
        module.require_weights()
        if FINGERPRINT not in own:
            raise IncompleteCheckpoint(
                f'{where}: the checkpoint holds neither the frozen backbone nor its fingerprint, '
                f'so it cannot be told which backbone it belongs to; its keys: {_shown(own)}')
        if own[FINGERPRINT].shape != (32, ) or not torch.equal(
                own[FINGERPRINT].cpu(), module.frozen_fingerprint.cpu()):
            raise FingerprintMismatch(
                f'{where}: the checkpoint was trained on another frozen backbone: expected '
                f'fingerprint {_hex(module.frozen_fingerprint)[:16]}…, got '
                f'{_hex(own[FINGERPRINT].flatten())[:16]}…; check backbone.init_cfg')
        if function is not None:
            _check_function(where, module, function, module.frozen_function)
        wanted = {k: t for k, t in wanted.items() if k not in frozen}
    _compare(where, wanted, {k: v for k, v in own.items() if k not in (FINGERPRINT, FUNCTION)})
    # Before anything is loaded; _FullLoad looks once more at what has arrived in the model.
    # Which tensors were frozen is not known where the pre-trained file was not to be had.
    known = full and prompted and not module.lacks_weights
    if known and FINGERPRINT in own:
        _check_together(where, own, {n: inner[n] for n in module.frozen_names if n in inner})
    if known and function is not None:
        _check_function(where, module, function, module.function_of(
            {n: own[f'backbone.{n}'] for n in module.frozen_names if f'backbone.{n}' in own}))
    module.__dict__['_incoming'] = (prefix, _FullLoad(
        own.get(FINGERPRINT) if known else None, known and function is not None) if full else None)


def _compare(where: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises when ``found`` lacks a key of ``wanted``, has others, or has other shapes."""
    optional = {k for k in wanted if k.endswith('num_batches_tracked')}
    missing = set(wanted) - set(found) - optional
    left_over = {k for k in set(found) - set(wanted) if not k.endswith('num_batches_tracked')}
    both = [(k, wanted[k], found[k]) for k in wanted if isinstance(found.get(k), Tensor)]
    shapes = [f'{k}: expected {tuple(a.shape)}, got {tuple(b.shape)}'
              for k, a, b in both if a.shape != b.shape]
    kinds = [f'{k}: expected {a.dtype}, got {b.dtype}' for k, a, b in both
             if a.is_floating_point() != b.is_floating_point() or a.is_complex() != b.is_complex()]
    parts = []
    if missing:
        parts.append(f'missing: {_shown(missing)}')
    if left_over:
        parts.append(f'not expected: {_shown(left_over)}')
    if shapes:
        parts.append(f'other shapes: {_shown(shapes)}')
    if kinds:
        parts.append(f'other types: {_shown(kinds)}')
    if parts:
        raise IncompleteCheckpoint(f'{where}: the checkpoint does not fit: ' + '; '.join(parts))


# --- whole models ----------------------------------------------------------------------------


def _state_dict_of(checkpoint: Any, path: str) -> dict[str, Tensor]:
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not state_dict or not all(
            isinstance(k, str) and _is_plain(v) for k, v in state_dict.items()):
        raise UnreadableCheckpoint(f'{path}: expected a state dict of tensors, got '
                                   f'{type(checkpoint).__name__}')
    return state_dict


def _is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of numbers in memory: not sparse, quantized or without data."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and \
        not tensor.is_quantized and not tensor.is_meta


def full_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict of a model with the frozen tensors in it."""
    state_dict = model.state_dict()
    for path, part in prompted_parts(model):
        prefix = f'{path}.backbone.' if path else 'backbone.'
        for name, tensor in part.frozen_tensors().items():
            state_dict[prefix + name] = tensor.detach()
    return state_dict


def problems(model: nn.Module, state_dict: Mapping[str, Tensor]) -> str | None:
    """What keeps a slim or full prompted state dict from filling the whole model.

    Args:
        model (nn.Module): The model, with its frozen backbone in place.
        state_dict (Mapping[str, Tensor]): Of a prompted model.

    Returns:
        str, optional: A description; None when every key fits, or when ``state_dict`` is not of a
        prompted model (a stock checkpoint, which hosts load by their own rules).

    Raises:
        FingerprintMismatch: It was trained on another frozen backbone.
        NonFiniteCheckpoint: It fits, and holds weights that are NaN or infinite.
    """
    if not {_key(path) for path, _ in prompted_parts(model)} & set(state_dict):
        return None
    try:
        _check_whole(model, state_dict)
    except IncompleteCheckpoint as error:
        return str(error)
    return None


def _key(path: str) -> str:
    return f'{path}.{FINGERPRINT}' if path else FINGERPRINT


def _check_whole(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Checks a state dict, stock ones too, against every key of a model, which stays as it is."""
    if not all(_is_plain(v) for v in state_dict.values()):
        raise IncompleteCheckpoint('the checkpoint holds something else than plain tensors')
    state_dict = dict(state_dict)
    wanted = dict(model.state_dict())
    for path, part in prompted_parts(model):
        prefix = f'{path}.' if path else ''
        check_incoming(part, state_dict, prefix, quiet=True)  # renames the keys of stock files
        part.__dict__.pop('_incoming', None)
        if any(f'{prefix}backbone.{n}' in state_dict for n in part.frozen_names):
            wanted.update((f'{prefix}backbone.{n}', t) for n, t in part.frozen_tensors().items())
            state_dict.setdefault(prefix + FINGERPRINT, part.frozen_fingerprint)
    wanted = {k: v for k, v in wanted.items() if isinstance(v, Tensor)}
    _compare(type(model).__name__, wanted, state_dict)
    parameters = {name for name, _ in model.named_parameters()}
    bad = [k for k, v in state_dict.items() if v.is_floating_point() and
           not (v.isfinite() if k in parameters else ~v.isnan()).all()]
    if bad:
        raise NonFiniteCheckpoint(f'values that are not finite in {_shown(bad)}')


def load(model: nn.Module, path: str | os.PathLike) -> dict:
    """Loads a slim or full prompted checkpoint into a model, all of it or nothing.

    Args:
        model (nn.Module): Built from the checkpoint's config.
        path (str | os.PathLike): Local file.

    Returns:
        dict: The checkpoint.

    Raises:
        CheckpointError: It cannot be read, or does not fit; the model is untouched.
    """
    path = os.fspath(path)
    checkpoint = read(path)
    state_dict = _state_dict_of(checkpoint, path)
    try:
        _check_whole(model, state_dict)
        incompatible = model.load_state_dict(state_dict, strict=False)
    except CheckpointError as error:
        raise type(error)(f'{path}: {error}') from None
    missing = [k for k in incompatible.missing_keys if not k.endswith('num_batches_tracked')]
    if missing or incompatible.unexpected_keys:
        raise IncompleteCheckpoint(f'{path}: missing: {_shown(missing) or "none"}; not expected: '
                                   f'{_shown(incompatible.unexpected_keys) or "none"}')
    return checkpoint


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
            fingerprint=_hex(part.frozen_fingerprint),
            frozen_tensors=len(frozen),
            frozen_bytes=sum(t.numel() * t.element_size() for t in frozen.values()),
            last_stage=part.last_stage,
            stages=[
                dict(name=s.name, path=s.path, channels=s.channels, stride=float(s.stride))
                for s in part.stages
            ])
    return dict(version=__version__, torch_version=str(torch.__version__), backbones=backbones)


# --- resuming ------------------------------------------------------------------------------------


def newest(work_dir: str | os.PathLike) -> str | None:
    """The newest whole checkpoint of a run.

    That is the one which ``last_checkpoint`` names, or one saved after it: a process can die
    between saving a checkpoint and noting its name, and while it notes it. Files that are broken
    are passed over with a warning.

    Args:
        work_dir (str | os.PathLike): Of the run.

    Returns:
        str, optional: Path of a checkpoint that can be resumed from; None where there is none.

    Raises:
        UnreadableCheckpoint: There are some, and all of them are broken.
    """
    work_dir = os.fspath(work_dir)
    note = os.path.join(work_dir, 'last_checkpoint')
    last = ''
    if os.path.isfile(note):
        with open(note, encoding='utf-8', errors='replace') as file:
            last = file.read().strip()
    files = {}
    for folder in {work_dir, os.path.dirname(last) or work_dir}:
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                files.update((entry.path, _age(entry.path)) for entry in entries if entry.is_file()
                             and re.fullmatch(r'(?!best_)[^.].*\d\.pth', entry.name))
    order = sorted(files, key=files.get, reverse=True)
    if os.path.isfile(last):
        # Later in time and in training; a copied folder has times in any order.
        noted = _age(last)
        order = [p for p in order if all(a > b for a, b in zip(files[p], noted))] + [last] + [
            p for p in order if p != last]
    broken = None
    for path in dict.fromkeys(order):
        try:
            checkpoint = read(path)
        except UnreadableCheckpoint as error:
            broken = broken or error
            print_log(f'passed over: {error}', logger='current', level=logging.WARNING)
            continue
        if isinstance(checkpoint, dict) and 'optimizer' in checkpoint:
            return path
    if broken is not None:
        raise broken
    return None


def _age(path: str) -> tuple[int, int]:
    """Time of the last change in nanoseconds, and the number at the end of the name."""
    number = re.search(r'(\d+)\.pth$', path)
    return os.stat(path).st_mtime_ns, int(number[1]) if number else -1


# --- the tool's four verbs -------------------------------------------------------------------


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
    state_dict = _state_dict_of(checkpoint, path)
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
        fingerprints={r.rstrip('.'): _hex(state_dict[r + FINGERPRINT]) for r in roots},
        backbones=known['backbones'],
        version=known['version'],
        epoch=meta['epoch'] if isinstance(meta.get('epoch'), int) else None,
        iter=meta['iter'] if isinstance(meta.get('iter'), int) else None,
        resumable='optimizer' in checkpoint)


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
            stages=[
                dict(name=str(s['name']), path=str(s['path']), channels=int(s['channels']),
                     stride=float(s['stride'])) for s in b['stages']
            ])
        for path, b in meta.get('backbones', {}).items()}
    return dict(version=None if version is None else str(version), backbones=backbones)


def _build(cfg: Config | str | os.PathLike) -> nn.Module:
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    if not isinstance(cfg, Config):
        cfg = Config.fromfile(os.fspath(cfg))
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if not prompted_parts(model):
        raise CheckpointError('the config holds no PromptedBackbone: expected '
                              "model.backbone.type='mmprotune.PromptedBackbone'")
    return model.eval()


def _writable(out: str | os.PathLike, force: bool) -> str:
    out = os.fspath(out)
    if os.path.exists(out) and not force:
        raise FileExistsError(f'{out} exists; nothing was written (--force overwrites)')
    return out


def _rewritten(checkpoint: dict, state_dict: Mapping[str, Tensor], meta: dict | None) -> dict:
    """A checkpoint for inference and fine-tuning: weights and meta, without optimizer state."""
    old = checkpoint.get('meta', {}) if 'state_dict' in checkpoint else {}
    new = {k: v for k, v in safe_io.to_plain(old).items() if k != 'mmprotune'}
    if meta is not None:
        new['mmprotune'] = meta
    return dict(
        meta=new,
        state_dict=OrderedDict((k, v.detach().cpu().clone()) for k, v in state_dict.items()))


def verify(path: str | os.PathLike, cfg: Config | str | os.PathLike) -> dict:
    """Checks a checkpoint against a config: fingerprint, keys, shapes, finite values.

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
    load(_build(cfg), path)
    return info


def extract(path: str | os.PathLike, cfg: Config | str | os.PathLike, out: str | os.PathLike,
            force: bool = False) -> dict:
    """Makes a slim checkpoint of a full one (prompted or stock).

    Args:
        path (str | os.PathLike): Full checkpoint.
        cfg (Config | str | os.PathLike): Config of the prompted model, or its file.
        out (str | os.PathLike): Where to write.
        force (bool): Whether an existing ``out`` is replaced. Defaults to False.

    Returns:
        dict: :func:`inspect` of the new file.

    Raises:
        CheckpointError: It does not fit, or its backbone is not the one that the config's
            pre-trained file holds (no one could load the slim file).
        FileExistsError: ``out`` exists.
    """
    out = _writable(out, force)
    if os.path.abspath(out) == os.path.abspath(os.fspath(path)):
        raise CheckpointError(f'{out}: input and output are the same file')
    model = _build(cfg)
    before = {p: part.frozen_fingerprint.clone() for p, part in prompted_parts(model)}
    checkpoint = load(model, path)
    for place, part in prompted_parts(model):
        if part.freeze == 'pretrained' and not torch.equal(before[place], part.frozen_fingerprint):
            raise FingerprintMismatch(
                f"{os.fspath(path)}: its backbone is not the one of the config's pre-trained file: "
                f'expected fingerprint {_hex(before[place])[:16]}…, got '
                f'{_hex(part.frozen_fingerprint)[:16]}…; a slim file of it could not be used')
    safe_io.write(_rewritten(checkpoint, model.state_dict(), describe_model(model)), out)
    return inspect(out)


def merge(path: str | os.PathLike, cfg: Config | str | os.PathLike, out: str | os.PathLike,
          force: bool = False) -> dict:
    """Makes a full checkpoint of a slim one.

    Where a backbone has no prompts, its keys are those of the stock model, which loads the file
    as it is; else those of the prompted model.

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
    out = _writable(out, force)
    if os.path.abspath(out) == os.path.abspath(os.fspath(path)):
        raise CheckpointError(f'{out}: input and output are the same file')
    model = _build(cfg)
    checkpoint = load(model, path)
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
    safe_io.write(_rewritten(checkpoint, state_dict, meta if meta['backbones'] else None), out)
    return inspect(out)
