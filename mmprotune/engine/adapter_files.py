"""Where the files of an adapter are: a folder, an archive, the Hugging Face Hub."""
from __future__ import annotations

import contextlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from mmprotune.checkpoints.meta import inspect
from mmprotune.checkpoints.untrusted import check_config
from mmprotune.config_nodes import parse_config
from mmprotune.errors import CheckpointError, UnreadableCheckpoint, listed

ADAPTER, CONFIG, CARD = 'adapter.safetensors', 'config.py', 'README.md'
# Deflate makes floats little smaller; a file that unpacks to more than this is a trap.
_MOST_UNPACKED = 50


@contextlib.contextmanager
def folder_of(source: str | os.PathLike, revision: str | None,
               local: bool = False) -> Iterator[Path]:
    """The folder with the files of an adapter."""
    path = Path(os.path.expanduser(os.fspath(source)))
    with contextlib.ExitStack() as stack:
        if path.is_dir():
            folder = path
        elif path.is_file():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _unzip(path, folder)
        elif not local and re.fullmatch(r'[\w.-]+/[\w.-]+', str(source)):
            hub = hub_client(f'{source}: no such folder or file here; as the id of a repository on '
                             'the Hugging Face Hub it')
            with hub_errors(str(source)):
                folder = Path(hub.snapshot_download(
                    str(source), revision=revision, allow_patterns=[ADAPTER, CONFIG]))
        else:
            raise FileNotFoundError(f'{source}: no such folder or file')
        missing = [file for file in (ADAPTER, CONFIG) if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(f'{source} is no packed adapter: expected {ADAPTER} and {CONFIG} '
                                  f'in it, missing: {listed(missing)}')
        yield folder


def _unzip(path: Path, folder: Path) -> None:
    """Unpacks the files of an adapter, at the top of an archive or in one folder in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.rpartition('/')[2]
                if name not in (ADAPTER, CONFIG, CARD) or entry.filename.count('/') > 1:
                    continue
                if entry.file_size > _MOST_UNPACKED * (entry.compress_size + 1024):
                    raise UnreadableCheckpoint(
                        f'{path} is refused: {entry.filename} would unpack to {entry.file_size:,} '
                        f'bytes, of {entry.compress_size:,}')
                if (folder / name).exists():
                    raise UnreadableCheckpoint(f'{path}: expected one {name} in it, got several')
                (folder / name).write_bytes(archive.read(entry))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise UnreadableCheckpoint(f'{path}: expected a folder, or a .zip of one: '
                                   f'{error}') from error


def read_config(folder: Path, source: object) -> Config:
    """The folder's config, parsed and not run."""
    try:
        cfg = parse_config((folder / CONFIG).read_text(encoding='utf-8'))
        check_config(cfg)
    except ValueError as error:  # of the parser, of UTF-8, and CheckpointError
        raise CheckpointError(f'{source}: {CONFIG} is refused: {error}') from None
    if not isinstance(cfg.get('model'), dict):
        raise CheckpointError(f'{source}: {CONFIG} has no model')
    return cfg


def check_fingerprint(folder: Path, source: object) -> None:
    """A stock checkpoint has none, and would be filled in on any backbone."""
    if not inspect(folder / ADAPTER)['fingerprints']:
        raise CheckpointError(f'{source}: {ADAPTER} has no fingerprint of a frozen backbone')


def hub_client(what: str = 'a repository on the Hugging Face Hub'):
    """The module ``huggingface_hub``; what needs it is named where it is missing."""
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"{what} needs `pip install 'mmprotune[hub]'` "
                              '(huggingface_hub)') from None
    return huggingface_hub


@contextlib.contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """The client and the HTTP library under it have many errors; each says what is wrong."""
    try:
        yield
    except Exception as error:
        first = ' '.join(str(error).split())[:300]
        raise CheckpointError(f'{repository}: the hub could not be used: '
                              f'{type(error).__name__}: {first}') from error
