"""What a checkpoint may hold: tensors and plain types, and the way there and back."""
from __future__ import annotations

import collections
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmprotune.errors import UnreadableCheckpoint

_TYPE = '__mmprotune_type__'
_LEAVE_OUT = object()


def to_plain(value: Any, where: str = 'checkpoint') -> Any:
    """Turns what MMEngine puts into a checkpoint into tensors and plain types.

    Args:
        value: Any object.
        where (str): Its place in the checkpoint, for the warning.

    Returns:
        An equal structure of dict, list, tuple, str, numbers, bool, None and tensors. History
        buffers, counters and arrays become tagged dicts, which :func:`from_plain` turns back;
        anything else is left out with a warning.
    """
    plain = _plain(value, where)
    return None if plain is _LEAVE_OUT else plain


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {_TYPE: 'ndarray', 'data': torch.from_numpy(np.ascontiguousarray(value))}
    if isinstance(value, HistoryBuffer):
        log, count = value.data
        return {
            _TYPE: 'HistoryBuffer',
            'log': torch.from_numpy(np.array(log, dtype=np.float64)),
            'count': torch.from_numpy(np.array(count, dtype=np.float64)),
            'max_length': value.max_length
        }
    if isinstance(value, collections.Counter):  # of a learning-rate scheduler
        return {_TYPE: 'Counter', 'items': [[_plain(k, where), n] for k, n in value.items()]}
    if isinstance(value, Mapping):
        items = ((k if type(k) in (int, float, bool, tuple, type(None)) else str(k),
                  _plain(v, f'{where}[{k!r}]')) for k, v in value.items())
        return {k: v for k, v in items if v is not _LEAVE_OUT}
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        items = [_plain(v, f'{where}[{i}]') for i, v in enumerate(value)]
        items = [v for v in items if v is not _LEAVE_OUT]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, (str, pathlib.PurePath)):
        return str(value)
    for kind in (bool, int, float):  # subclasses, enumerations among them
        if isinstance(value, kind):
            return kind(value)
    warnings.warn(f'{where} is left out of the checkpoint: {type(value).__name__} is neither a '
                  'tensor nor a plain type', stacklevel=2)
    return _LEAVE_OUT


def from_plain(value: Any, where: str = 'checkpoint') -> Any:
    """The inverse of :func:`to_plain` for history buffers, counters and arrays.

    Args:
        value: What :func:`read` returned, or a part of it. Changed in place.
        where (str): Its place in the checkpoint, for the error.

    Raises:
        UnreadableCheckpoint: Something in it is not what :func:`to_plain` makes.
    """
    try:
        return _from_plain(value)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UnreadableCheckpoint(
            f'{where} is malformed: {type(error).__name__}: {error}') from error


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        kind = value.get(_TYPE)
        if kind == 'ndarray':
            return value['data'].cpu().numpy()
        if kind == 'Counter':
            return collections.Counter(dict(value['items']))
        if kind == 'HistoryBuffer':
            return HistoryBuffer(
                value['log'].cpu().numpy(), value['count'].cpu().numpy(), value['max_length'])
        for key, item in value.items():
            value[key] = _from_plain(item)
        return value
    if isinstance(value, list):
        return [_from_plain(v) for v in value]
    if type(value) is tuple:
        return tuple(_from_plain(v) for v in value)
    return value
