"""Runs the cells of a comparison in processes of their own."""
from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device

from mmprotune.errors import MMProtuneError

from .cells import run_cell
from .holdout import Split
from .plan import Cell, Plan, Results, due, still_to_come


def one_line(error: Exception) -> str:
    """An error as one line, which names the file where a data set could not be read."""
    from mmprotune.datasets.checked import dataset_error  # with mmseg, which takes seconds
    told = error if isinstance(error, MMProtuneError) else dataset_error(error) or error
    # Our own errors say what is wrong without their name.
    name = '' if isinstance(told, MMProtuneError) else f'{type(told).__name__}: '
    return re.sub(r'\s+', ' ', f'{name}{told}').strip()[:500]


def _in_child(work: Callable, folder: Path, threads: int, args: tuple) -> None:
    """What the process of a cell does; its output goes to ``output.txt``, its result beside it."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: an orphan would train on
        ctypes.CDLL('libc.so.6').prctl(1, signal.SIGKILL)
    if not multiprocessing.parent_process().is_alive():  # ended before this one was ready
        return
    log = os.open(folder / 'output.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, 'w')
    if get_device() == 'cpu':
        torch.set_num_threads(threads)
    warnings.simplefilter('ignore')
    try:
        result = dict(metrics=work(*args), error='')
    except Exception as error:
        traceback.print_exc()
        result = dict(metrics={}, error=one_line(error))
    sys.stdout.flush()
    part = folder / 'result.part'
    part.write_text(json.dumps(result))
    part.replace(folder / 'result.json')


class _Job:
    """A cell at work in a process of its own."""

    def __init__(self, cell: Cell, args: tuple, folder: Path, threads: int,
                 device: str | None, keep: bool) -> None:
        self.cell, self.device, self._began = cell, device, time.monotonic()
        self._folder = folder / cell.name
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / 'result.json').unlink(missing_ok=True)
        # A forked process has all imports done; CUDA does not survive a fork.
        context = multiprocessing.get_context('fork' if device is None else 'spawn')
        self.process = context.Process(
            target=_in_child, args=(run_cell, self._folder, threads,
                                    (*args, str(self._folder), keep)))
        with _visible(device):
            self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def result(self) -> dict:
        """What came out, after the process has ended."""
        self.process.join()
        seconds = round(time.monotonic() - self._began, 1)
        try:
            found = json.loads((self._folder / 'result.json').read_text())
        except (OSError, ValueError):
            code = self.process.exitcode
            cause = signal.Signals(-code).name if code < 0 else f'status {code}'
            found = dict(metrics={}, error=f'the process ended with {cause}')
        return dict(found, seconds=seconds)


def _import_once(library: str | None) -> None:
    """Imports what forked processes would import one by one."""
    for name in ('datasets', 'evaluation', 'models', 'visualization'):
        with contextlib.suppress(ImportError):  # a library of the user's own may be built otherwise
            importlib.import_module(f'{library}.{name}')


@contextlib.contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """While open, processes that are started see one GPU."""
    before = os.environ.get('CUDA_VISIBLE_DEVICES')
    if device is not None:
        os.environ['CUDA_VISIBLE_DEVICES'] = device
    try:
        yield
    finally:
        if device is not None:
            os.environ.pop('CUDA_VISIBLE_DEVICES')
            if before is not None:
                os.environ['CUDA_VISIBLE_DEVICES'] = before


def devices() -> list[str]:
    """The GPUs to use, as ``CUDA_VISIBLE_DEVICES`` names them; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get('CUDA_VISIBLE_DEVICES')
    return named.split(',') if named else [str(i) for i in range(torch.cuda.device_count())]


def run_all(cfg: Config, plan: Plan, split: Split | None, results: Results, folder: Path,
            jobs: int, threads: int = 1) -> Iterator[tuple[Cell, dict, int]]:
    """Runs what is not known yet, and yields results as they come; they are kept already.

    Args:
        cfg (Config): The config that is compared.
        plan (Plan): The plan.
        split (Split, optional): Where the training set is divided; None without a sweep.
        results (Results): What is known.
        folder (Path): For the cells' logs, a folder each.
        jobs (int): Processes at a time; on GPUs at most one each is sensible.
        threads (int): Of each process on a CPU. Defaults to 1.

    Yields:
        tuple: The cell, its result, and how many are left as far as is known.
    """
    methods = {method.name: method for method in plan.methods}
    places = devices() or [None]
    if places == [None]:
        _import_once(cfg.get('default_scope'))
    active: list[_Job] = []
    try:
        while True:
            busy = {job.cell for job in active}
            waiting = [cell for cell in due(plan, results.known)
                       if cell not in results.known and cell not in busy]
            while waiting and len(active) < jobs:
                cell = waiting.pop(0)
                used = [job.device for job in active]
                active.append(_Job(cell, (cfg, methods[cell.method], cell, split), folder,
                                   threads, min(places, key=used.count), plan.keep_weights))
            if not active:
                return
            wait([job.process.sentinel for job in active])
            for job in [job for job in active if not job.process.is_alive()]:
                active.remove(job)
                result = job.result()
                results.add(job.cell, result)
                left = len([cell for cell in due(plan, results.known)
                            if cell not in results.known])
                yield job.cell, result, left + still_to_come(plan, results.known)
    finally:
        for job in active:
            job.kill()
