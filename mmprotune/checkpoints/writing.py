"""Writing files whole or not at all."""
from __future__ import annotations

import contextlib
import io
import os
import re
from typing import Any

import torch
from mmengine.fileio import LocalBackend

from mmprotune.errors import CheckpointNotWritten

BACKEND = 'mmprotune_atomic'


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
