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

from ..config_nodes import class_names, node_of, prompted_nodes, training_patterns
from ..frozen import fingerprint
from ..frozen.fingerprint import OPTIONAL_BUFFERS
from ..version import __version__
from . import reading as safe_io
from .reading import CheckpointError, CheckpointNotWritten, UnreadableCheckpoint, read, register

__all__ = [
    'CheckpointError', 'CheckpointNotWritten', 'FingerprintMismatch', 'FunctionMismatch',
    'IncompleteCheckpoint',
    'NonFiniteCheckpoint', 'UnreadableCheckpoint', 'describe_model', 'extract', 'frozen_origins',
    'full_state_dict', 'inspect', 'load', 'merge', 'newest', 'origin_hint', 'problems',
    'prompted_parts', 'read', 'register', 'training_names', 'verify'
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
    """A state dict that brings the frozen tensors too.

    Attributes:
        frozen (dict[str, Tensor]): Those that make the backbone the same one, as they are to be
            loaded, by dotted name in the backbone.
        has_function (bool): Whether it says what the network computes.
        checked (bool): Whether they came with a fingerprint, and what arrives is to be checked.
        cast (bool): Whether the model was cast as a whole since it was built (``model.half()``).
    """
    frozen: dict[str, Tensor]
    has_function: bool
    checked: bool
    cast: bool

    def verify(self, module: nn.Module) -> None:
        module.refresh_fingerprint()
        if not self.has_function:
            function = module.function_of()
            # Not for the sake of rounding: the same backbone gives the same file.
            if max(module.function_distance(function, module.frozen_function)) > ROUNDING or \
                    not module.frozen_function.any():
                module.frozen_function.copy_(function)
        if self.checked:
            arrived = module.frozen_tensors()
            expected = fingerprint({n: t.to(arrived[n].dtype) for n, t in self.frozen.items()})
            if not torch.equal(expected, module.frozen_fingerprint.cpu()):
                raise FingerprintMismatch(
                    'the frozen tensors are not what the checkpoint holds after loading it: '
                    f'expected {_hex(expected)[:16]}…, got {_hex(module.frozen_fingerprint)[:16]}…')
        if self.cast:
            # The identity stays that of the weights before the cast, as for one that was built
            # with them: slim files of it load before the cast and after.
            sha = fingerprint(self.frozen)
            module.frozen_fingerprint.copy_(sha)
            module.own_fingerprint = _hex(sha)


def _identity(names) -> list[str]:
    """Names of the frozen tensors that make a backbone the same one."""
    return [name for name in names if name.rpartition('.')[2] not in OPTIONAL_BUFFERS]


def _check_together(where: str, sha: Tensor, own: Mapping[str, Tensor],
                    frozen: Mapping[str, Tensor]) -> bool:
    """Raises when the frozen tensors that came do not have the fingerprint that came with them.

    They are looked at as they came, in their own precision.

    Returns:
        bool: Whether the file's model froze the same ones.
    """
    names = _identity(frozen)
    found = fingerprint({name: own.get(f'backbone.{name}', frozen[name]) for name in names})
    if torch.equal(sha.cpu(), found):
        return True
    # Where the file's model froze everything and this one does not, the file is whole too.
    inner = {key.partition('.')[2]: t for key, t in own.items() if key.startswith('backbone.')}
    if not torch.equal(sha.cpu(), fingerprint({name: inner[name] for name in _identity(inner)})):
        raise FingerprintMismatch(
            f'{where}: the frozen tensors in the checkpoint do not match the fingerprint in it: '
            f'expected {_hex(sha)[:16]}…, got {_hex(found)[:16]}…; the file is damaged or was put '
            'together from two, or `freeze` and `trainable` were others')
    return False


def _prepare(where: str, backbone: nn.Module, own: dict[str, Tensor]) -> None:
    """Lets the backbone's own load hooks have their way with a state dict; they resize tables.

    Hosts run them too late: when the shapes have been compared. Those that find nothing to do,
    as after this, change nothing.

    Args:
        where (str): For the error.
        backbone (nn.Module): The wrapped backbone.
        own (dict[str, Tensor]): State dict of the prompted one; changed in place.
    """
    inner = {key.partition('.')[2]: t for key, t in own.items() if key.startswith('backbone.')}
    before = dict(inner)
    try:
        for path, module in backbone.named_modules():
            for hook in module._load_state_dict_pre_hooks.values():
                hook(inner, f'{path}.' if path else '', {}, True, [], [], [])
    except Exception as error:  # a stranger's shapes
        first = (str(error).strip().splitlines() or [''])[0]
        raise IncompleteCheckpoint(f'{where}: the checkpoint does not fit: '
                                   f'{type(error).__name__}: {first}') from error
    # What hooks leave out is computed by the backbone: it stays as it is, and is not missing.
    present = backbone.state_dict()
    inner.update((key, present[key]) for key in before if key not in inner and key in present)
    for key in before:
        if key not in inner:
            del own[f'backbone.{key}']
    own.update((f'backbone.{key}', tensor) for key, tensor in inner.items())


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
                f'{_hex(own[FINGERPRINT].flatten())[:16]}…; check backbone.init_cfg and '
                'frozen_from')
        if function is not None:
            _check_function(where, module, function, module.frozen_function)
        wanted = {k: t for k, t in wanted.items() if k not in frozen}
    came = dict(own)
    if full:
        _prepare(where, module.backbone, own)
        for key in set(came) - set(own):
            del state_dict[prefix + key]
        state_dict.update((prefix + key, tensor) for key, tensor in own.items())
    _compare(where, wanted, {k: v for k, v in own.items() if k not in (FINGERPRINT, FUNCTION)})
    full_load = None
    if full:
        present = {n: inner[n] for n in module.frozen_names if n in inner}
        # Which tensors were frozen is not known where the pre-trained file was not to be had.
        known = prompted and not module.lacks_weights
        checked = known and FINGERPRINT in own
        coming = {n: own.get(f'backbone.{n}', present[n]) for n in _identity(present)}
        # Before anything is loaded; _FullLoad looks once more at what has arrived.
        same = checked and _check_together(where, own[FINGERPRINT], came, present)
        # What was resized, or trained there and not here, computes something else.
        has_function = same and function is not None and all(
            own.get(key) is tensor for key, tensor in came.items())
        if has_function:
            _check_function(where, module, function, module.function_of(coming))
        full_load = _FullLoad(coming, has_function=has_function, checked=checked,
                              cast=_was_cast(module, present, coming))
    module.__dict__['_incoming'] = prefix, full_load


def _was_cast(module: nn.Module, present: Mapping[str, Tensor],
              coming: Mapping[str, Tensor]) -> bool:
    """Whether a model's frozen tensors are in another precision than their fingerprint is of."""
    return any(present[name].dtype != tensor.dtype for name, tensor in coming.items()) and \
        bool(module.frozen_fingerprint.any()) and not torch.equal(
            module.frozen_fingerprint.cpu(), fingerprint({n: present[n] for n in coming}))


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
        frozen = {name: tensor.detach() for name, tensor in part.frozen_tensors().items()}
        state_dict.update((prefix + name, tensor) for name, tensor in frozen.items())
        # Of what is written: the model may have been cast since its own was taken.
        state_dict[_key(path)] = fingerprint({n: frozen[n] for n in _identity(frozen)})
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
        raise type(error)(f'{path}: {error}{origin_hint(model, checkpoint)}') from None
    missing = [k for k in incompatible.missing_keys if not k.endswith('num_batches_tracked')]
    if missing or incompatible.unexpected_keys:
        raise IncompleteCheckpoint(f'{path}: missing: {_shown(missing) or "none"}; not expected: '
                                   f'{_shown(incompatible.unexpected_keys) or "none"}')
    return checkpoint


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
        if known is None or known['fingerprint'] == _hex(part.frozen_fingerprint):
            continue
        key = _key_of(path)
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


def _key_of(path: str) -> str:
    """The config key of a prompted backbone."""
    return f'model.{path}' if path else 'model'


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


def _backbones_of(checkpoint: Any) -> dict:
    """What the meta of a checkpoint says of its backbones; empty where it is of no use."""
    try:
        return _known(checkpoint['meta']['mmprotune'])['backbones']
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return {}


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
            pretrained=getattr(part, 'frozen_source', None),
            frozen_from=getattr(part, 'frozen_from', None),
            trains=training_names(part),
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
        IncompleteCheckpoint: The newest one was saved without an optimizer. Going on from an older
            one, or training anew, would overwrite it.
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
            if not isinstance(checkpoint, dict):
                raise UnreadableCheckpoint(f'{path}: expected a dict with a state dict, got '
                                           f'{type(checkpoint).__name__}')
        except UnreadableCheckpoint as error:
            broken = broken or error
            print_log(f'passed over: {error}', logger='current', level=logging.WARNING)
            continue
        if 'optimizer' in checkpoint:
            return path
        # Not every file with a number is the run's: pre-trained and published ones may lie here.
        if path == last or re.fullmatch(r'(epoch|iter)_\d+\.pth', os.path.basename(path)):
            raise IncompleteCheckpoint(
                f'{path}: it holds no optimizer, so training cannot be resumed from it, and would '
                f'overwrite it: start in another work_dir, with load_from={path} for its weights')
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
            **{key: None if b.get(key) is None else str(b[key])
               for key in ('pretrained', 'frozen_from')},
            trains=[str(name) for name in b.get('trains') or ()],
            stages=[
                dict(name=str(s['name']), path=str(s['path']), channels=int(s['channels']),
                     stride=float(s['stride'])) for s in b['stages']
            ])
        for path, b in meta.get('backbones', {}).items()}
    return dict(version=None if version is None else str(version), backbones=backbones)


def _config(cfg: Config | str | os.PathLike) -> Config:
    return cfg if isinstance(cfg, Config) else Config.fromfile(os.fspath(cfg))


def _build(cfg: Config | str | os.PathLike) -> nn.Module:
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    cfg = _config(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if not prompted_parts(model):
        raise CheckpointError('the config holds no PromptedBackbone: expected '
                              "model.backbone.type='mmprotune.PromptedBackbone'")
    return model.eval()


def _self_contained(cfg: Config, model: nn.Module) -> Config:
    """A config whose model builds without a pre-trained file, and freezes what ``model`` does."""
    from ..engine.cli import without_pretrained
    cfg = without_pretrained(cfg)
    nodes = prompted_nodes(cfg.get('model'))
    for path, part in prompted_parts(model):
        node = node_of(path, nodes)
        if node is not None:
            node['trainable'] = training_patterns(node, training_names(part))
    return cfg


def training_names(part: nn.Module) -> list[str]:
    """Dotted names of the parameters of a prompted backbone's frozen network that train."""
    return [name for name, _ in part.backbone.named_parameters() if name not in part.frozen_names]


def _writable(out: str | os.PathLike, force: bool) -> str:
    out = os.fspath(out)
    if out.endswith('.safetensors'):
        raise CheckpointError(f'{out}: expected a name that ends with .pth; a checkpoint holds '
                              'more than tensors, and safetensors files do not')
    if os.path.exists(out) and not force:
        raise FileExistsError(f'{out} exists; nothing was written (--force overwrites)')
    return out


def _rewritten(checkpoint: dict, state_dict: Mapping[str, Tensor], meta: dict | None,
               cfg: Config) -> dict:
    """A checkpoint for inference and fine-tuning: weights and meta, without optimizer state.

    Inferencers that get no config build the one in the meta, so it must be one for these weights.
    """
    old = checkpoint.get('meta', {}) if 'state_dict' in checkpoint else {}
    new = {k: v for k, v in safe_io.to_plain(old).items() if k != 'mmprotune'}
    if meta is not None:
        new['mmprotune'] = meta
    try:
        new['cfg'] = cfg.pretty_text
    except SyntaxError:  # MMEngine writes no config with classes in place of names
        new.pop('cfg', None)
        print_log('the config is left out of the meta: it holds objects that cannot be written',
                  logger='current', level=logging.WARNING)
    return dict(
        meta=new,
        state_dict=OrderedDict((k, v.detach().cpu().clone()) for k, v in state_dict.items()))


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
    _check_classes(load(_build(cfg), path), cfg, info['path'])
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
    cfg = _config(cfg)
    model = _build(cfg)
    before = {p: part.frozen_fingerprint.clone() for p, part in prompted_parts(model)}
    checkpoint = load(model, path)
    for place, part in prompted_parts(model):
        if part.freeze == 'pretrained' and not torch.equal(before[place], part.frozen_fingerprint):
            raise FingerprintMismatch(
                f"{os.fspath(path)}: its backbone is not the one of the config's pre-trained file: "
                f'expected fingerprint {_hex(before[place])[:16]}…, got '
                f'{_hex(part.frozen_fingerprint)[:16]}…; a slim file of it could not be used. '
                f'With {_key_of(place)}.frozen_from={os.path.abspath(path)} it can')
    safe_io.write(_rewritten(checkpoint, model.state_dict(), describe_model(model), cfg), out)
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
    out = _writable(out, force)
    if os.path.abspath(out) == os.path.abspath(os.fspath(path)):
        raise CheckpointError(f'{out}: input and output are the same file')
    cfg = _config(cfg)
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
    safe_io.write(_rewritten(checkpoint, state_dict, meta if meta['backbones'] else None,
                             _self_contained(cfg, model)), out)
    return inspect(out)
