"""Reading checkpoints without running code, and writing them whole or not at all."""
from __future__ import annotations

import collections
import contextlib
import io
import os
import pathlib
import pickle
import types
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import Tensor

BACKEND = 'mmprotune_atomic'


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which and why."""


class UnreadableCheckpoint(CheckpointError):
    """The file is truncated, no checkpoint, or holds more than data."""


# --- reading ---------------------------------------------------------------------------------


def _statistic(owner: Any, name: Any) -> Any:
    """Stands in for ``getattr``, by which MMEngine's pickles name a history buffer's methods."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError('builtins.getattr')


def _numpy(name: str) -> Any:
    module = np.core.multiarray if np.lib.NumpyVersion(np.__version__) < '2.0.0' \
        else np._core.multiarray
    return getattr(module, name)


# What MMEngine's own checkpoints hold beside tensors; data only.
_DATA_TYPES = {
    ('mmengine.logging.history_buffer', 'HistoryBuffer'): HistoryBuffer,
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('collections', 'deque'): collections.deque,
    ('collections', 'Counter'): collections.Counter,
    ('builtins', 'getattr'): _statistic,
    ('__builtin__', 'getattr'): _statistic,
    ('builtins', 'set'): set,
    ('builtins', 'slice'): slice,
    ('_codecs', 'encode'): lambda text, encoding: text.encode('latin1'),
    ('numpy', 'dtype'): np.dtype,
    ('numpy', 'ndarray'): np.ndarray,
    ('torch', 'Size'): torch.Size,
    ('torch', 'device'): torch.device,
    ('torch._utils', '_rebuild_tensor'): torch._utils._rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): torch._utils._rebuild_tensor_v2,
    ('torch._utils', '_rebuild_parameter'): torch._utils._rebuild_parameter,
    ('torch.serialization', '_get_layout'): torch.serialization._get_layout,
}
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    for _name in ('scalar', '_reconstruct'):
        _DATA_TYPES[_module, _name] = _numpy(_name)


class _DataUnpickler(pickle.Unpickler):
    """Builds the types above and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == 'torch' and name.endswith('Storage') and hasattr(torch, name):
            return getattr(torch, name)
        try:
            return _DATA_TYPES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f'{module}.{name}') from None


_data_pickle = types.SimpleNamespace(
    __name__='mmprotune.safe_io',
    Unpickler=_DataUnpickler,
    UnpicklingError=pickle.UnpicklingError,
    load=lambda file, **kwargs: _DataUnpickler(file, **kwargs).load(),
    loads=lambda data, **kwargs: _DataUnpickler(io.BytesIO(data), **kwargs).load())


def read(path: str | os.PathLike, map_location: Any = 'cpu') -> Any:
    """Reads a checkpoint file without running anything in it.

    Slim checkpoints load under ``weights_only=True``. MMEngine's own hold a few more types; those
    are read by a list of names, and any other name in the pickle is refused.

    Args:
        path (str | os.PathLike): Local ``.pth`` (or ``.safetensors``) file.
        map_location: As in :func:`torch.load`. Defaults to 'cpu'.

    Returns:
        What the file holds: usually a dict.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableCheckpoint: The file is truncated, no checkpoint, or its pickle wants code run.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} can not be found.')
    if path.endswith('.safetensors'):
        return _read_safetensors(path, map_location)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        pass  # more than tensors and plain types, or no pickle at all
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError,
            OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise UnreadableCheckpoint(_broken(path, error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return torch.load(
                path, map_location=map_location, weights_only=False, pickle_module=_data_pickle)
    except pickle.UnpicklingError as error:
        name = str(error)
        if zipfile.is_zipfile(path) or ('.' in name and ' ' not in name):
            raise UnreadableCheckpoint(
                f'{path} is refused: its pickle calls for {name}, expected tensors and plain data. '
                'Nothing in it was run') from error
        raise UnreadableCheckpoint(_broken(path, error)) from error
    except Exception as error:  # garbage can make the unpickler raise anything
        raise UnreadableCheckpoint(_broken(path, error)) from error


def _broken(path: str, error: Exception) -> str:
    first = (str(error).splitlines() or [''])[0]
    return (f'{path} ({os.path.getsize(path)} bytes) is truncated or no PyTorch checkpoint: '
            f'{type(error).__name__}: {first}')


def _read_safetensors(path: str, map_location: Any) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UnreadableCheckpoint(f'{path}: reading it needs `pip install safetensors`') from None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UnreadableCheckpoint(_broken(path, error)) from error
    if map_location is None or callable(map_location):
        return tensors
    return {k: v.to(map_location) for k, v in tensors.items()}


# --- plain types -----------------------------------------------------------------------------

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


def from_plain(value: Any) -> Any:
    """The inverse of :func:`to_plain` for history buffers, counters and arrays."""
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
            value[key] = from_plain(item)
        return value
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if type(value) is tuple:
        return tuple(from_plain(v) for v in value)
    return value


# --- writing ---------------------------------------------------------------------------------


def write_bytes(data: bytes, path: str | os.PathLike) -> None:
    """Writes a file whole or not at all: to a temporary name beside it, synced, then renamed.

    Args:
        data (bytes): Content.
        path (str | os.PathLike): Where; its folder is made when missing.

    Raises:
        OSError: Writing failed; what was at ``path`` before is untouched.
    """
    path = os.path.abspath(os.fspath(path))
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f'.{name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if os.name == 'posix':  # the new name itself must survive a power cut
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write(checkpoint: Any, path: str | os.PathLike) -> int:
    """Writes a checkpoint of tensors and plain types atomically.

    Args:
        checkpoint: What to write; must load under ``weights_only=True``.
        path (str | os.PathLike): Where.

    Returns:
        int: Bytes written.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_bytes(buffer.getvalue(), path)
    return buffer.tell()


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local file backend, with writes that happen whole or not at all."""

    def put(self, obj: bytes | memoryview, filepath: str | os.PathLike) -> None:
        write_bytes(bytes(obj), filepath)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        write_bytes(obj.encode(encoding), filepath)


def register() -> None:
    """Makes MMEngine read local checkpoints with :func:`read`, and adds the atomic backend.

    MMEngine 0.10 hands its own checkpoints to ``torch.load`` with defaults that newer PyTorch
    refuses; with this, ``load_from``, ``resume`` and the inferencers read them, and safely.
    """
    CheckpointLoader.register_scheme(
        prefixes='', loader=lambda filename, map_location=None: read(filename, map_location),
        force=True)
    register_backend(BACKEND, AtomicLocalBackend, force=True)
