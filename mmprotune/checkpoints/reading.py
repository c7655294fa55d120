"""Reading checkpoints without running code."""
from __future__ import annotations

import collections
import io
import json
import os
import pickle
import re
import sys
import tarfile
import types
import warnings
import zipfile
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, get_rank
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmprotune.errors import UnreadableCheckpoint


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
        What the file holds: usually a dict. Of a ``.safetensors`` file its tensors by name, or
        those and their meta in a checkpoint's form, where :func:`to_safetensors` wrote it.

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


def read_address(url: str, map_location: Any = 'cpu') -> Any:
    """As :func:`read`, of an address; its file is kept where ``torch.hub`` keeps them.

    MMEngine's loader, in whose place this one stands, would run what is in the file.

    Args:
        url (str): ``http://…`` or ``https://…``.
        map_location: As in :func:`torch.load`. Defaults to 'cpu'.

    Raises:
        OSError: The download failed.
        UnreadableCheckpoint: As :func:`read`.
    """
    folder = os.path.join(torch.hub.get_dir(), 'checkpoints')
    path = os.path.join(folder, os.path.basename(urlparse(url).path))
    for turn in (get_rank() == 0, get_rank() > 0):  # on another machine, it is not there yet
        if turn and not os.path.exists(path):
            os.makedirs(folder, exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=False)
        barrier()
    return read(path, map_location)


# --- safetensors ---------------------------------------------------------------------------------


def to_safetensors(state_dict: dict[str, Tensor], meta: dict) -> bytes:
    """A file of tensors, and of a meta that JSON can say; the way back is :func:`read`.

    Args:
        state_dict (dict[str, Tensor]): Plain tensors by name.
        meta (dict): Plain types; it goes into the header, which holds text.

    Raises:
        UnreadableCheckpoint: safetensors is not installed.
    """
    save = _safetensors('writing safetensors').torch.save
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state_dict.items()}
    return save(tensors, dict(format='pt', mmprotune=json.dumps(meta)))


def _safetensors(what: str) -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise UnreadableCheckpoint(
            f"{what} needs `pip install 'mmprotune[hub]'` (safetensors)") from None
    return safetensors


def _read_safetensors(path: str, map_location: Any) -> dict[str, Any]:
    safetensors = _safetensors(f'{path}: reading it')
    device = None if map_location is None or callable(map_location) else map_location
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            text = (file.metadata() or {}).get('mmprotune')
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = None if text is None else json.loads(text)
        if not isinstance(meta, (dict, type(None))):
            raise ValueError(f'expected a dict for mmprotune in its header, got {meta!r:.60}')
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UnreadableCheckpoint(_broken(path, error)) from error
    if device is not None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return tensors if meta is None else dict(meta=meta, state_dict=tensors)


def state_dict_of(checkpoint: Any, path: str) -> dict[str, Tensor]:
    state_dict = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not state_dict or not all(
            isinstance(k, str) and is_plain(v) for k, v in state_dict.items()):
        raise UnreadableCheckpoint(f'{path}: expected a state dict of tensors, got '
                                   f'{type(checkpoint).__name__}')
    return state_dict


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor of numbers in memory: not sparse, quantized or without data."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and \
        not tensor.is_quantized and not tensor.is_meta
