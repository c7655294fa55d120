"""Starting, awaiting and killing real processes.

They are forked from a server process which has imported everything already: it costs seconds once,
not once a process.
"""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from pathlib import Path

from tests.test_tools.conftest import REPO

from . import work

SECONDS = 300  # after which a process hangs, for all we know

_context = multiprocessing.get_context('forkserver')


def start(name: str, argv: list, log: Path, **options) -> multiprocessing.Process:
    """Starts a tool; see :func:`work.run_tool` for the options."""
    _context.set_forkserver_preload([work.__name__])
    # Its server looks for the modules by this variable only.
    os.environ['PYTHONPATH'] = os.pathsep.join(
        dict.fromkeys(filter(None, [str(REPO), os.environ.get('PYTHONPATH')])))
    process = _context.Process(
        target=work.run_tool, args=(name, [str(a) for a in argv], str(log)), kwargs=options,
        daemon=True)
    process.start()
    return process


def finish(*processes: multiprocessing.Process) -> list[int]:
    """Waits for processes to end; returns their exit codes. One that hangs is killed, loudly."""
    for process in processes:
        process.join(SECONDS)
    hung = [p for p in processes if p.is_alive()]
    kill(*hung)
    assert not hung, f'{len(hung)} processes did not end within {SECONDS} s'
    return [p.exitcode for p in processes]


def kill(*processes: multiprocessing.Process) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.join()


def pipe():
    """A one-way pipe: (to read from, to write to)."""
    return _context.Pipe(duplex=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def start_ranks(name: str, argvs: list[list], log: Path, **options) -> list:
    """Starts one process for each argument list, as the ranks of one gloo group."""
    port = str(free_port())
    return [
        start(name, [*argv, '--launcher', 'pytorch'], Path(f'{log}.{rank}'), env=dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(argvs)),
            MASTER_ADDR='127.0.0.1', MASTER_PORT=port), **options)
        for rank, argv in enumerate(argvs)]
