"""Reading checkpoints without running code, and writing them whole or not at all."""
from __future__ import annotations

import collections
import contextlib
import io
import os
import pathlib
import pickle
import re
import sys
import tarfile
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
    """The file is truncated, damaged, no checkpoint, or holds more than data."""


class CheckpointNotWritten(CheckpointError, OSError):
    """A file could not be written: the disk is full, say. What was there before still is."""


# --- reading ---------------------------------------------------------------------------------


def _statistic(owner: Any, name: Any) -> Any:
    """Stands in for ``getattr``, by which MMEngine's pickles name a history buffer's methods."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError('builtins.getattr')


class _Array:
    """Stands in for ``numpy.ndarray``, which could be made over any memory."""


def _new_array(kind: Any, shape: Any, _) -> np.ndarray:
    """NumPy's ``_reconstruct``: an empty array, which its state then fills."""
    if kind is not _Array or tuple(shape) != (0, ):
        raise pickle.UnpicklingError('numpy.ndarray')
    return np.empty(0, np.int8)


def _dtype(name: Any, *_) -> np.dtype:
    """Stands in for ``numpy.dtype``: numbers only, no objects, no records."""
    if not isinstance(name, str) or not re.fullmatch(r'[biufc]\d{1,2}|bool', name):
        raise pickle.UnpicklingError('numpy.dtype')
    return np.dtype(name)


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError('numpy.scalar')
    return np.frombuffer(data, dtype, count=1)[0]


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
    ('numpy', 'dtype'): _dtype,
    ('numpy', 'ndarray'): _Array,
    ('torch', 'Size'): torch.Size,
    ('torch', 'device'): torch.device,
    ('torch._utils', '_rebuild_tensor'): torch._utils._rebuild_tensor,
    ('torch._utils', '_rebuild_tensor_v2'): torch._utils._rebuild_tensor_v2,
    ('torch._utils', '_rebuild_parameter'): torch._utils._rebuild_parameter,
    ('torch.serialization', '_get_layout'): torch.serialization._get_layout,
}
for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    _DATA_TYPES[_module, 'scalar'] = _numpy_scalar
    _DATA_TYPES[_module, '_reconstruct'] = _new_array


def _set_state(target: Any, state: Any) -> None:
    """What a pickle may do to an object after making it, for the few that need it."""
    if isinstance(target, np.dtype):
        # (version, byte order, …): made from its name alone, so only the order is left to check.
        native = '<' if sys.byteorder == 'little' else '>'
        if state[1] not in ('|', '=', native) or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError('numpy.dtype.__setstate__')
    elif type(target) is np.ndarray and isinstance(state[2], np.dtype):
        target.__setstate__(state)
    elif type(target) is HistoryBuffer:
        # Not `statistics_methods`: they would be set for the whole class.
        target.__dict__.update(
            (key, state[key]) for key in ('_log_history', '_count_history', 'max_length'))
        target._set_default_statistics()
    elif type(target) is collections.OrderedDict and set(state) <= {'_metadata'}:
        target.__dict__.update(state)
    else:
        kind = type(target)
        raise pickle.UnpicklingError(f'{kind.__module__}.{kind.__qualname__}.__setstate__')


class _DataUnpickler(pickle._Unpickler):
    """Builds the types above and nothing else.

    Python's own unpickler, not the one in C: that one takes the numbers of memo entries at their
    word, and a file of 20 bytes makes it fill all memory.
    """
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == 'torch' and name.endswith('Storage') and hasattr(torch, name):
            return getattr(torch, name)
        try:
            return _DATA_TYPES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f'{module}.{name}') from None

    def load_build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)

    dispatch[pickle.BUILD[0]] = load_build


_data_pickle = types.SimpleNamespace(
    __name__='mmprotune.checkpoints.reading',
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
    # Damaged files can make any of these raise anything.
    try:
        _check_container(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except UnreadableCheckpoint:
        raise
    except pickle.UnpicklingError:
        pass  # more than tensors and plain types, or no pickle at all
    except Exception as error:
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
    except Exception as error:
        raise UnreadableCheckpoint(_broken(path, error)) from error


def _check_container(path: str) -> None:
    """Checks a file before PyTorch opens it: what kind it is, and the checksums that are in it.

    PyTorch writes a CRC-32 of every tensor and does not look at it when it reads: without this, a
    flipped bit would load as another weight.
    """
    with open(path, 'rb') as file:
        zipped = file.read(4) == b'PK\x03\x04'
    if not zipped:
        if tarfile.is_tarfile(path):
            raise UnreadableCheckpoint(f'{path} is refused: a tar archive, expected a file that '
                                       'torch.save of PyTorch 0.4 or newer wrote')
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        inner = {entry.filename.partition('/')[2] for entry in entries}
        if 'constants.pkl' in inner or any(name.startswith('code/') for name in inner):
            raise UnreadableCheckpoint(f'{path} is refused: a TorchScript program, expected '
                                       'tensors and plain data')
        packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
        if packed or sum(e.file_size for e in entries) > os.path.getsize(path):
            raise UnreadableCheckpoint(
                f'{path} is refused: it would unpack to more than it is '
                f'({_first(packed) or "entries overlap"}); torch.save does not compress')
        damaged = archive.testzip()
        if damaged is not None:
            raise UnreadableCheckpoint(
                f'{path} ({os.path.getsize(path)} bytes) is damaged: {damaged} in it does not '
                'match its CRC-32')


def _first(names: list[str]) -> str:
    return f'{names[0]} is compressed' if names else ''


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


# --- writing ---------------------------------------------------------------------------------


def write_bytes(data: bytes, path: str | os.PathLike) -> None:
    """Writes a file whole or not at all: to a temporary name beside it, synced, then renamed.

    The temporary file is locked while it is written, so that one whose writer was killed can be
    told from one in use; :func:`remove_stale` and the next write of the same name remove it.

    Args:
        data (bytes): Content.
        path (str | os.PathLike): Where; its folder is made when missing.

    Raises:
        CheckpointNotWritten: Writing failed; what was at ``path`` before is untouched.
    """
    path = os.path.abspath(os.fspath(path))
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f'.{name}.{os.getpid()}.tmp')
    try:
        os.makedirs(folder, exist_ok=True)
        remove_stale(folder, name)
        try:
            with open(temporary, 'wb') as file:
                _lock(file)
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
    except OSError as error:
        before = 'what was there before is untouched' if os.path.exists(path) else \
            'nothing is there'
        raise CheckpointNotWritten(
            f'{path} ({len(data)} bytes) could not be written: {error.strerror or error}; {before}'
        ) from error


def _lock(file: io.IOBase) -> bool:
    """Locks a file for this process, until it ends or closes it. False: another one holds it."""
    if os.name != 'posix':
        return True
    import fcntl
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return os.path.basename(file.name).split('.')[-2] == str(os.getpid())
    return True


def remove_stale(folder: str | os.PathLike, name: str | None = None) -> list[str]:
    """Removes temporary files whose writers were killed.

    Args:
        folder (str | os.PathLike): Where; not below it.
        name (str, optional): Of the file that was being written. Defaults to any.

    Returns:
        list[str]: Paths of the removed files.
    """
    pattern = re.compile(r'\.' + ('.+' if name is None else re.escape(name)) + r'\.\d+\.tmp')
    removed = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not pattern.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError), open(entry.path, 'rb') as file:
                if _lock(file):
                    os.unlink(entry.path)
                    removed.append(entry.path)
    return sorted(removed)


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
    """MMEngine's local file backend, with writes that happen whole or not at all.

    MMEngine's checkpoint hook removes the oldest checkpoint before it writes the newest. With one
    to keep, a process that dies in between leaves none. So what is removed goes when the next file
    has been written.
    """
    _doomed: list[str] = []  # of all instances: MMEngine makes one a file

    def put(self, obj: bytes | memoryview, filepath: str | os.PathLike) -> None:
        write_bytes(bytes(obj), filepath)
        written = os.path.abspath(filepath)
        for path in list(self._doomed):
            if os.path.dirname(path) == os.path.dirname(written):
                self._doomed.remove(path)
                if path != written:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(path)

    def put_text(self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8') -> None:
        write_bytes(obj.encode(encoding), filepath)

    def remove(self, filepath: str | os.PathLike) -> None:
        if not self.isfile(filepath):
            raise FileNotFoundError(f'{os.fspath(filepath)} is no file')
        self._doomed.append(os.path.abspath(filepath))


def register() -> None:
    """Makes MMEngine read local checkpoints with :func:`read`, and adds the atomic backend.

    MMEngine 0.10 hands its own checkpoints to ``torch.load`` with defaults that newer PyTorch
    refuses; with this, ``load_from``, ``resume`` and the inferencers read them, and safely.
    """
    CheckpointLoader.register_scheme(
        prefixes='', loader=lambda filename, map_location=None: read(filename, map_location),
        force=True)
    register_backend(BACKEND, AtomicLocalBackend, force=True)
