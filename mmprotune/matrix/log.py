"""Results of configs in a file, from which a command that was cut off goes on."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch

from mmprotune import __version__

from . import LIBRARIES
from .limits import Limits


def settings(limits: Limits, insert: str | None = None) -> dict:
    """What results depend on: limits, places of prompts and versions. Results under others are not
    put together."""
    versions = {name: importlib.import_module(name).__version__ for name in LIBRARIES}
    return dict(memory=limits.memory, seconds=limits.seconds, insert=insert, mmprotune=__version__,
                torch=torch.__version__, **versions)


class Log:
    """Results in a file of JSON lines, the first of which holds the settings.

    Args:
        path (Path, optional): The file; it is gone on with where it exists. None: no file.
        settings (dict): See :func:`settings`.

    Attributes:
        results (dict[str, dict]): By key.

    Raises:
        ValueError: The file is not such a log, or was begun with other settings.
    """

    def __init__(self, path: Path | None, settings: dict) -> None:
        self.path = path
        self.results: dict[str, dict] = {}
        if path is None:
            return
        text = path.read_text() if path.exists() else ''
        # A line that was being written when the command was cut off has no end.
        lines = text.splitlines() if text.endswith('\n') else text.splitlines()[:-1]
        if text and not lines:
            raise ValueError(f'{path} is no log of this tool')
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if number:
                    self.results[entry['key']] = entry
                elif entry['settings'] != settings:
                    raise ValueError(f'{path} was begun with {entry["settings"]}, not with '
                                     f'{settings}; name another file')
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number + 1}, is none of this tool') from None
        path.parent.mkdir(parents=True, exist_ok=True)
        if not lines:
            path.write_text(json.dumps(dict(settings=settings)) + '\n')
        elif not text.endswith('\n'):
            path.write_text('\n'.join(lines) + '\n')

    def add(self, result: dict) -> None:
        self.results[result['key']] = result
        if self.path is not None:
            with self.path.open('a') as file:
                file.write(json.dumps(result, default=str) + '\n')
