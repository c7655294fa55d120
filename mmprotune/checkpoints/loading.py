"""Checkpoints and whole models: all of a checkpoint is loaded, or nothing."""
from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from mmprotune.errors import CheckpointError, IncompleteCheckpoint, NonFiniteCheckpoint, listed
from mmprotune.freezing.fingerprint import fingerprint, identity

from .meta import origin_hint
from .reading import is_plain, read, state_dict_of
from .slim import FINGERPRINT, check_incoming, compare, prompted_parts


def full_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict of a model with the frozen tensors in it."""
    state_dict = model.state_dict()
    for path, part in prompted_parts(model):
        prefix = f'{path}.backbone.' if path else 'backbone.'
        frozen = {name: tensor.detach() for name, tensor in part.frozen_tensors().items()}
        state_dict.update((prefix + name, tensor) for name, tensor in frozen.items())
        # Of what is written: the model may have been cast since its own was taken.
        state_dict[_key(path)] = fingerprint(identity(frozen))
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
    if not all(is_plain(v) for v in state_dict.values()):
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
    compare(type(model).__name__, wanted, state_dict)
    parameters = {name for name, _ in model.named_parameters()}
    bad = [k for k, v in state_dict.items() if v.is_floating_point() and
           not (v.isfinite() if k in parameters else ~v.isnan()).all()]
    if bad:
        raise NonFiniteCheckpoint(f'values that are not finite in {listed(sorted(bad))}')


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
    fill(model, checkpoint, path)
    return checkpoint


def fill(model: nn.Module, checkpoint: dict, path: str) -> None:
    """As :func:`load`, with a checkpoint that was read already.

    Args:
        model (nn.Module): Built from the checkpoint's config.
        checkpoint (dict): The checkpoint.
        path (str): Where it came from, for errors.
    """
    state_dict = state_dict_of(checkpoint, path)
    try:
        _check_whole(model, state_dict)
        incompatible = model.load_state_dict(state_dict, strict=False)
    except CheckpointError as error:
        raise type(error)(f'{path}: {error}{origin_hint(model, checkpoint)}') from None
    missing = [k for k in incompatible.missing_keys if not k.endswith('num_batches_tracked')]
    if missing or incompatible.unexpected_keys:
        raise IncompleteCheckpoint(f'{path}: missing: {listed(sorted(missing))}; not expected: '
                                   f'{listed(sorted(incompatible.unexpected_keys))}')
