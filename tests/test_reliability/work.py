"""What the processes of these tests do: ``tools/train.py`` and ``tools/test.py``, watched.

The process from which they are forked imports this module first, so that they start at once.
"""
from __future__ import annotations

import builtins
import os
import signal
import sys
from multiprocessing.connection import Connection

# Slow to import, and needed by each of them.
import mmdet.datasets.transforms
import mmdet.engine
import mmdet.evaluation
import mmdet.models
import mmdet.visualization  # noqa: F401
import mmengine.hooks.checkpoint_hook as checkpoint_hook
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmprotune import safe_io
from mmprotune.engine import launch
from tests.test_tools.conftest import load_tool

_beacon: Connection | None = None


@HOOKS.register_module(force=True)
class Beacon(Hook):
    """Tells the test how far training is: once before and once after each iteration."""
    priority = 'LOWEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if _beacon is not None:
            _beacon.send(('before', runner.iter))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if _beacon is not None:
            _beacon.send(('after', runner.iter))


def run_tool(name: str, argv: list[str], log: str, env: dict[str, str] | None = None,
             beacon: Connection | None = None, die: tuple | None = None,
             size_limit: int | None = None) -> None:
    """Runs a tool as its command line would, in a process of its own.

    Args:
        name (str): 'train.py' or 'test.py'.
        argv (list[str]): Its arguments.
        log (str): File for what it prints.
        env (dict[str, str], optional): Environment variables.
        beacon (Connection, optional): See :class:`Beacon`.
        die (tuple, optional): See :func:`die_while_saving`.
        size_limit (int, optional): The most bytes that a file may have (RLIMIT_FSIZE).
    """
    global _beacon
    _beacon = beacon
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env or {})
    sys.argv = [name, *argv]
    if die is not None:
        die_while_saving(*die)
    if size_limit is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, size_limit))
    status = launch.run_tool(lambda: load_tool(name).main(argv))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as a process ends that has nothing to tell its parent


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(step: str, nth: int, fraction: float) -> None:
    """Makes this process kill itself inside its nth save from now.

    Args:
        step (str): 'write' (after a part of the bytes), 'sync', 'rename', 'renamed' (right after
            it), or 'note' (with ``last_checkpoint`` emptied and not yet written).
        nth (int): From 1.
        fraction (float): Of the bytes, for 'write'.
    """
    saves = [0]

    def due() -> bool:
        saves[0] += 1
        return saves[0] == nth

    if step == 'write':

        def opened(path, mode='r', *args, **kwargs):
            file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115
            if mode == 'wb' and due():
                safe_io._lock(file)
                real = file.write

                class Torn:

                    def write(self, data):
                        real(data[:int(len(data) * fraction)])
                        file.flush()
                        _kill_self()

                    def __enter__(self):
                        return self

                    def __exit__(self, *exc_info):
                        file.close()

                    def __getattr__(self, name):
                        return getattr(file, name)

                return Torn()
            return file

        safe_io.open = opened
    elif step == 'note':

        def noted(path, mode='r', *args, **kwargs):
            file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115
            if str(path).endswith('last_checkpoint') and due():
                _kill_self()
            return file

        checkpoint_hook.open = noted
    else:
        os_of_safe_io = _Os(step, due)
        safe_io.os = os_of_safe_io


class _Os:
    """The module ``os``, with a death on the way."""

    def __init__(self, step, due):
        self._step, self._due = step, due

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        if self._step == 'sync' and self._due():
            _kill_self()
        os.fsync(descriptor)

    def replace(self, source, target):
        if self._step == 'rename' and self._due():
            _kill_self()
        os.replace(source, target)
        if self._step == 'renamed' and self._due():
            _kill_self()
