"""The runs of a comparison: the config of each, and processes of their own."""
from __future__ import annotations

import contextlib
import copy
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
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed
from torch import nn

from mmprotune.config_nodes import dicts_in, type_name
from mmprotune.engine.runner import build_runner
from mmprotune.errors import MMProtuneError
from mmprotune.lean.memory import KeptBytes

from .holdout import Split, hold_out
from .methods import Method, apply_method
from .plan import Cell, Plan, Results, due, still_to_come

# Of the hooks that a cell has no use for: they write files, or figures for people.
IDLE_HOOKS = ('CheckpointHook', 'PromptCheckpointHook', 'PromptStatsHook', 'EarlyStoppingHook')


# --- one cell -----------------------------------------------------------------------------------


def cell_config(cfg: Config, method: Method, cell: Cell, split: Split | None,
                folder: str, keep: bool = False) -> Config:
    """The config of one cell: the method, rate and seed; one validation at the end; no files
    but, for a final run, the weights where they are to be kept.

    Args:
        cfg (Config): The config that is compared, left as it is.
        method (Method): The cell's method.
        cell (Cell): The cell.
        split (Split, optional): Where the training set is divided; needed in the phase 'sweep'.
        folder (str): Where its log goes.
        keep (bool): Whether a final run leaves its weights there. Defaults to False.

    Returns:
        Config: A config that ``tools/train.py`` takes as well.
    """
    cfg = apply_method(copy.deepcopy(cfg), method)
    if cell.lr is not None:
        set_rate(cfg, cell.lr)
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
    kept = None
    cfg.default_hooks['checkpoint'] = None  # or MMEngine adds its own
    if keep and cell.phase == 'final':
        kept = 'PromptCheckpointHook'
        cfg.default_hooks['checkpoint'] = dict(
            type='CheckpointHook', interval=-1, by_epoch=cfg.train_cfg.get('type') != (
                'IterBasedTrainLoop') and cfg.train_cfg.get('by_epoch', True),
            save_optimizer=False, save_param_scheduler=False)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or []
                        if not _is_idle(hook) or type_name(hook) == kept]
    cfg.visualizer = dict(type='mmengine.Visualizer', vis_backends=[], name=cell.name)
    cfg.work_dir, cfg.launcher, cfg.experiment_name = folder, 'none', cell.name
    cfg.resume = False
    return cfg


def set_rate(cfg: Config, lr: float) -> None:
    """Sets the learning rate; what schedules name as a rate (``eta_min``) keeps its proportion."""
    factor = lr / cfg.optim_wrapper.optimizer.lr
    cfg.optim_wrapper.optimizer.lr = lr
    for schedule in dicts_in(cfg.get('param_scheduler')):
        if type_name(schedule).endswith('LR'):  # others are of momentum
            for key in ('eta_min', 'eta_max'):
                if schedule.get(key) is not None:
                    schedule[key] *= factor


def _is_idle(hook: object) -> bool:
    return type_name(hook) in IDLE_HOOKS


def run_cell(cfg: Config, method: Method, cell: Cell, split: Split | None, folder: str,
             keep: bool = False) -> dict:
    """Trains and validates, or counts.

    Args:
        cfg, method, cell, split, folder, keep: See :func:`cell_config`.

    Returns:
        dict: Numbers by name.
    """
    cfg = cell_config(cfg, method, cell, split, folder, keep)
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
