"""The cells of a comparison of methods: what is to be run, each in a process, and what came out."""
from __future__ import annotations

import contextlib
import copy
import ctypes
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed
from torch import nn

from mmprotune.config_nodes import type_name
from mmprotune.engine.holdout import Split, hold_out
from mmprotune.engine.methods import Method, apply_method
from mmprotune.engine.runner import build_runner
from mmprotune.errors import LaunchError
from mmprotune.lean.memory import KeptBytes

# How often the grid is extended on a side where the best rate is its last.
EXTENSIONS = 2
# Of the hooks that a cell has no use for: they write files, or figures for people.
IDLE_HOOKS = ('CheckpointHook', 'PromptCheckpointHook', 'PromptStatsHook', 'EarlyStoppingHook')


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        phase (str): 'cost' counts parameters and bytes, 'sweep' trains without the held-out images
            and is scored on them, 'final' trains on all and is scored on the validation set.
        method (str): Name of the method.
        lr (float, optional): Learning rate; None in the phase 'cost'.
        seed (int, optional): Likewise.
    """
    phase: str
    method: str
    lr: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        rest = '' if self.lr is None else f'_lr{self.lr:g}_seed{self.seed}'
        return f'{self.phase}_{self.method}{rest}'


# --- what is to be run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        methods (Sequence[Method]): The methods.
        lrs (Sequence[float]): The grid, ascending; of one rate no sweep is made.
        seeds (Sequence[int]): Of the final runs.
        sweep_seeds (Sequence[int]): Of the sweep.
        metric (str): Decides about rates; the larger the better.
    """
    methods: Sequence[Method]
    lrs: Sequence[float]
    seeds: Sequence[int]
    sweep_seeds: Sequence[int]
    metric: str


@dataclass
class Sweep:
    """Where the sweep of one method stands.

    Attributes:
        cells (list[Cell]): All that are to be run so far.
        best (float, optional): The best rate, once all have been run; None where all failed.
        done (bool): Whether all have been run.
        edge (str): 'lowest' or 'highest' where the best rate is the last of the extended grid.
    """
    cells: list[Cell]
    best: float | None = None
    done: bool = False
    edge: str = ''


def sweep_of(plan: Plan, method: Method, results: dict[Cell, dict]) -> Sweep:
    """Which rates of a method are to be tried, given what is known already.

    The grid is extended by its own factor where the best rate is its last, at most
    ``EXTENSIONS`` times a side. A rate with a failed run counts as worse than all others.
    """
    rates = [_rounded(lr * method.lr_scale) for lr in plan.lrs]
    if len(rates) == 1:
        return Sweep([], rates[0], True)
    down, up = rates[0] / rates[1], rates[-1] / rates[-2]
    lowered = raised = 0
    while True:
        cells = {lr: [Cell('sweep', method.name, lr, seed) for seed in plan.sweep_seeds]
                 for lr in rates}
        flat = [cell for one in cells.values() for cell in one]
        if any(cell not in results for cell in flat):
            return Sweep(flat)
        scores = {lr: mean_score([results[cell] for cell in one], plan.metric)
                  for lr, one in cells.items()}
        # Of equals the one in the middle: nothing speaks for going on at an end.
        middle = (len(rates) - 1) / 2
        best = max(rates, key=lambda lr: (scores[lr], -abs(rates.index(lr) - middle)))
        if scores[best] == -math.inf:
            return Sweep(flat, None, True)
        if best == rates[-1] and raised < EXTENSIONS:
            rates.append(_rounded(rates[-1] * up))
            raised += 1
        elif best == rates[0] and lowered < EXTENSIONS:
            rates.insert(0, _rounded(rates[0] * down))
            lowered += 1
        else:
            edge = {rates[0]: 'lowest', rates[-1]: 'highest'}.get(best, '')
            return Sweep(flat, best, True, edge)


def _rounded(lr: float) -> float:
    return float(f'{lr:.3g}')


def mean_score(results: Sequence[dict], metric: str) -> float:
    """Mean of a metric over runs; minus infinity where one failed."""
    values = [score_of(result, metric) for result in results]
    return -math.inf if None in values else sum(values) / len(values)


def score_of(result: dict, metric: str) -> float | None:
    """The metric of one run; None where it failed, or where that is no finite number."""
    value = None if result['error'] else result['metrics'].get(metric)
    return value if value is not None and math.isfinite(value) else None


def due(plan: Plan, results: dict[Cell, dict]) -> list[Cell]:
    """All cells that can be run now or have been, given what is known already, in order.

    Args:
        plan (Plan): The plan.
        results (dict[Cell, dict]): What is known.

    Returns:
        list[Cell]: Costs of all methods, then method by method. More may come up once these are
        known; a method whose costs could not be counted has no others.
    """
    cells = [Cell('cost', method.name) for method in plan.methods]
    for method in plan.methods:
        cost = results.get(Cell('cost', method.name))
        if cost is None or cost['error']:
            continue
        sweep = sweep_of(plan, method, results)
        cells += sweep.cells
        if sweep.done and sweep.best is not None:
            cells += [Cell('final', method.name, sweep.best, seed) for seed in plan.seeds]
    return cells


def still_to_come(plan: Plan, results: dict[Cell, dict]) -> int:
    """How many final runs are not due yet, as their rate is not known."""
    count = 0
    for method in plan.methods:
        cost = results.get(Cell('cost', method.name))
        if cost is None:
            count += (0 if len(plan.lrs) == 1 else len(plan.lrs) * len(plan.sweep_seeds))
        if cost is None or not cost['error'] and not sweep_of(plan, method, results).done:
            count += len(plan.seeds)
    return count


# --- what is known ------------------------------------------------------------------------------


class Results:
    """Results in a file of JSON lines, one a cell; later lines of a cell stand for earlier ones.

    Args:
        file (Path): The file; it is gone on with where it exists.

    Attributes:
        known (dict[Cell, dict]): By cell: ``metrics``, ``seconds``, ``error``.

    Raises:
        LaunchError: It is none of this kind.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[Cell, dict] = {}
        text = file.read_text(encoding='utf-8') if file.exists() else ''
        # A line that was being written when the command was cut off has no end.
        lines = text.splitlines() if text.endswith('\n') else text.splitlines()[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise LaunchError(f'{file}, line {number}, is no result of this tool: '
                                  f'{error!r}') from None
        if text and not text.endswith('\n'):
            whole = ''.join(line + '\n' for line in lines)
            part = file.with_suffix('.part')
            part.write_text(whole, encoding='utf-8')
            part.replace(file)

    def _take(self, entry: dict) -> None:
        cell = Cell(entry['phase'], entry['method'], entry['lr'], entry['seed'])
        self.known[cell] = {key: entry[key] for key in ('metrics', 'seconds', 'error')}

    def add(self, cell: Cell, result: dict) -> None:
        """Keeps a result, on disk too before anything else begins."""
        entry = dict(asdict(cell), **result)
        self._take(entry)
        with self.file.open('a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')
            file.flush()
            os.fsync(file.fileno())

    def forget_failures(self) -> None:
        """What failed is tried again; the file keeps it until it has been."""
        self.known = {cell: result for cell, result in self.known.items() if not result['error']}


# --- one cell -----------------------------------------------------------------------------------


def cell_config(cfg: Config, method: Method, cell: Cell, split: Split | None,
                folder: str) -> Config:
    """The config of one cell: the method, rate and seed; one validation at the end; no files.

    Args:
        cfg (Config): The config that is compared, left as it is.
        method (Method): The cell's method.
        cell (Cell): The cell.
        split (Split, optional): Where the training set is divided; needed in the phase 'sweep'.
        folder (str): Where its log goes.

    Returns:
        Config: A config that ``tools/train.py`` takes as well.
    """
    cfg = apply_method(copy.deepcopy(cfg), method)
    cfg.optim_wrapper.optimizer.lr = cell.lr or cfg.optim_wrapper.optimizer.lr
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=cell.seed or 0)
    if cell.phase == 'sweep':
        hold_out(cfg, split)
    # Validation comes once, after training.
    for key in ('dynamic_intervals', 'val_begin'):
        cfg.train_cfg.pop(key, None)
    cfg.train_cfg.val_interval = 10**9
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        cfg.pop(key, None)
    hooks = dict(cfg.get('default_hooks') or {})
    cfg.default_hooks = {name: hook for name, hook in hooks.items()
                         if not _is_idle(hook) and name != 'visualization'}
    cfg.default_hooks['checkpoint'] = None  # or MMEngine adds its own
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if not _is_idle(hook)]
    cfg.visualizer = dict(type='mmengine.Visualizer', vis_backends=[], name=cell.name)
    cfg.work_dir, cfg.launcher, cfg.experiment_name = folder, 'none', cell.name
    return cfg


def _is_idle(hook: object) -> bool:
    return type_name(hook) in IDLE_HOOKS


def run_cell(cfg: Config, method: Method, cell: Cell, split: Split | None, folder: str) -> dict:
    """Trains and validates, or counts.

    Args:
        cfg, method, cell, split, folder: See :func:`cell_config`.

    Returns:
        dict: Numbers by name.
    """
    cfg = cell_config(cfg, method, cell, split, folder)
    if cell.phase == 'cost':
        return count_costs(cfg)
    runner = build_runner(cfg)
    seen = _Metrics()
    runner.register_hook(seen)
    runner.train()
    # MMEngine's loops validate at their end; others may not.
    found = runner.val() if seen.metrics is None else seen.metrics
    return {name: float(value) for name, value in found.items() if _is_number(value)}


class _Metrics(Hook):
    """Keeps what the last validation reported."""

    metrics: dict | None = None

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        self.metrics = dict(metrics or {})


def _is_number(value: object) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def count_costs(cfg: Config) -> dict:
    """What a method costs, by one forward pass on the first batch of the training set.

    Args:
        cfg (Config): Of :func:`cell_config`.

    Returns:
        dict: ``trained_backbone``, parameters that train in the backbone, prompts included;
        ``trained``, all that train; ``kept``, bytes that autograd keeps for the backward pass;
        ``checkpoint``, bytes of the weights that are saved.
    """
    runner = build_runner(cfg)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    model = runner.model
    runner._init_model_weights()
    set_random_seed(0)
    loader = Runner.build_dataloader(copy.deepcopy(runner._train_dataloader), seed=0)
    batch = next(iter(loader))
    model.train()
    data = model.data_preprocessor(batch, True)
    with wrapper.optim_context(model), KeptBytes(model) as kept:
        loss = model.parse_losses(model(**data, mode='loss'))[0]
    kept_bytes = kept.total()
    del loss
    state = model.state_dict().values()
    return dict(
        trained_backbone=_trained(model, True), trained=_trained(model, False), kept=kept_bytes,
        checkpoint=sum(t.numel() * t.element_size() for t in state if torch.is_tensor(t)))


def _trained(model: nn.Module, backbone: bool) -> int:
    return sum(p.numel() for name, p in model.named_parameters()
               if p.requires_grad and (not backbone or 'backbone' in name.split('.')))


# --- processes ----------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    return re.sub(r'\s+', ' ', f'{type(error).__name__}: {error}').strip()[:500]


def _in_child(work: Callable, folder: Path, threads: int, args: tuple) -> None:
    """What the process of a cell does; its output goes to ``output.txt``, its result beside it."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: an orphan would train on
        ctypes.CDLL('libc.so.6').prctl(1, signal.SIGKILL)
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
                 device: str | None) -> None:
        self.cell, self.device, self._began = cell, device, time.monotonic()
        self._folder = folder / cell.name
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / 'result.json').unlink(missing_ok=True)
        # A forked process has all imports done; CUDA does not survive a fork.
        context = multiprocessing.get_context('fork' if device is None else 'spawn')
        self.process = context.Process(
            target=_in_child, args=(run_cell, self._folder, threads,
                                    (*args, str(self._folder))))
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
                                   threads, min(places, key=used.count)))
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


def time_to_go(plan: Plan, results: dict[Cell, dict], left: int, jobs: int) -> float:
    """Seconds, by the mean of the runs that trained so far."""
    times = [result['seconds'] for cell, result in results.items()
             if cell.phase != 'cost' and not result['error']]
    return left * sum(times) / len(times) / jobs if times else math.nan
