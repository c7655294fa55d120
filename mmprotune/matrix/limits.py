"""Runs the checks of configs in forked processes, under limits of memory and time."""
from __future__ import annotations

import importlib
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
from mmengine.logging import MMLogger

from . import LIBRARIES
from .configs import Run, root
from .failures import one_line, out_of_memory
from .files import NO_FILE, file_key
from .prompted import check_prompted
from .stock import check_stock, check_stock_step


@dataclass(frozen=True)
class Limits:
    """What one process may take.

    Attributes:
        memory (float): Address space in GB (10^9 bytes).
        seconds (float): Processor time, so that a busy machine gives the same verdicts as an idle
            one; by the clock it may be ten times as much.
    """
    memory: float = 9
    seconds: float = 180


def _in_child(check: Callable, run: Run, limits: Limits, out: Path, args: tuple) -> None:
    """What a forked process does: one check, its result in the file ``out``."""
    log = os.open(out.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, 'w')  # a test's may be others
    size = int(limits.memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    seconds = math.ceil(limits.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    os.chdir(root(run.library).parent)  # some configs name others as configs/…
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    try:
        result = check(run, *args)
    except Exception as error:
        told = f'not within {limits.memory:g} GB' if out_of_memory(error) else one_line(error)
        result = dict(error=told, traceback=traceback.format_exc()[-6000:])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result.update(peak_mb=usage.ru_maxrss // 1024, seconds=usage.ru_utime + usage.ru_stime)
    out.write_text(json.dumps(result, default=str))


class _Job:
    """A run at work: its stock model, then the prompted one, a process each; where that one fails,
    a whole step of the stock model."""

    def __init__(self, run: Run, limits: Limits, insert: str | None) -> None:
        self.run = run
        self.limits = limits
        self.insert = insert
        self.folder = tempfile.TemporaryDirectory(prefix='config_matrix_')
        self.stock: dict | None = None
        self.failed: dict | None = None
        self._start('stock', check_stock)

    def _start(self, name: str, check: Callable, *args) -> None:
        folder = Path(self.folder.name)
        self._out = folder / f'{name}.json'
        self._deadline = time.monotonic() + 10 * self.limits.seconds
        self.process = multiprocessing.get_context('fork').Process(
            target=_in_child, args=(check, self.run, self.limits, self._out, (folder, *args)))
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.folder.cleanup()

    def poll(self) -> dict | None:
        """The result, once there is one."""
        late = time.monotonic() > self._deadline
        if self.process.is_alive() and not late:
            return None
        if late:
            self.process.kill()
        self.process.join()
        try:
            found = json.loads(self._out.read_text())
        except (OSError, ValueError):
            late = late or self.process.exitcode == -signal.SIGXCPU
            found = dict(error=f'not within {self.limits.seconds:g} s' if late
                         else self._last_words())
        if self.stock is None and 'error' not in found:
            self.stock = found
            self._start('prompted', check_prompted, found, self.insert)
            return None
        if self.failed is None and self.stock and (found.get('error') or found.get('faults')):
            self.failed = found
            self._start('step', check_stock_step, self.stock)
            return None
        self.folder.cleanup()
        return self._result(found)

    def _last_words(self) -> str:
        code = self.process.exitcode
        cause = signal.Signals(-code).name if code < 0 else f'status {code}'
        words = self._out.with_suffix('.log').read_text(errors='replace').strip()
        if out_of_memory(words):
            return f'not within {self.limits.memory:g} GB'
        return one_line(f'the process ended with {cause}: {words[-200:]}')

    def _result(self, found: dict) -> dict:
        parts = [part for part in (self.stock, self.failed, found) if part]
        seconds = round(sum(part.get('seconds', 0) for part in parts), 1)
        if self.stock and 'error' not in found:
            verdict = 'fail' if self.failed else 'pass'
            found = dict(self.failed or found, size=self.stock['size'])
        else:
            verdict = 'host'
        error, faults = found.pop('error', ''), found.pop('faults', [])
        return dict(found, key=self.run.key, configs=self.run.configs, verdict=verdict,
                    reason=error or '; '.join(faults), file=file_key(self.run.cfg),
                    seconds=seconds)


def check_all(runs: Sequence[Run], jobs: int = 1, limits: Limits = Limits(),
              insert: str | None = None) -> Iterator[dict]:
    """Checks runs, in forked processes, and yields results as they come.

    Args:
        runs (Sequence[Run]): The runs.
        jobs (int): Processes at a time. Defaults to 1.
        limits (Limits): What each may take. Defaults to ``Limits()``.
        insert (str, optional): See :func:`~mmprotune.matrix.prompted.check_prompted`.

    Yields:
        dict: ``key`` and ``configs`` of the run; ``verdict``: 'pass', 'fail', or 'host' where the
        stock model does not load, build, compute losses or take a step; ``reason``; ``file``, see
        :func:`~mmprotune.matrix.files.file_key`; ``seconds`` of processor time for all models;
        ``traceback`` of an error; what :func:`~mmprotune.matrix.prompted.check_prompted` returns.
    """
    for library in LIBRARIES:  # once, for all children
        importlib.import_module(f'{library}.models')
    waiting, active = list(runs), []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                if run.cfg is None:
                    yield dict(key=run.key, configs=run.configs, verdict='host', file=NO_FILE,
                               reason=f'the config does not load: {run.error}', seconds=0)
                else:
                    active.append(_Job(run, limits, insert))
            if active:
                wait([job.process.sentinel for job in active], timeout=1)
            for job in list(active):
                result = job.poll()
                if result is not None:
                    active.remove(job)
                    yield result
    finally:
        for job in active:
            job.kill()
