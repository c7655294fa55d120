"""One cell of a comparison: its config, and what its run reports."""
from __future__ import annotations

import copy

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed
from mmengine.utils import import_modules_from_strings
from torch import nn

from mmprotune.config_nodes import dicts_in, type_name
from mmprotune.engine.runner import build_runner
from mmprotune.errors import LaunchError
from mmprotune.lean.memory import KeptBytes

from .holdout import Split, hold_out
from .methods import Method, apply_method
from .plan import Cell

# Of the hooks that a cell has no use for: they write files, or figures for people.
IDLE_HOOKS = ('CheckpointHook', 'PromptCheckpointHook', 'PromptStatsHook', 'EarlyStoppingHook')
# Where evaluators write what they read again; runs at the same time need a place each.
RESULT_KEYS = ('outfile_prefix', 'output_dir')


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
    keep = keep and cell.phase == 'final'
    if not keep:  # weights that stay are to be tested
        for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
            cfg.pop(key, None)
    for number, node in enumerate(dicts_in(cfg.val_evaluator)):
        for key in RESULT_KEYS:
            if node.get(key):
                node[key] = f'{folder}/evaluator{number}'
    hooks = dict(cfg.get('default_hooks') or {})
    cfg.default_hooks = {name: hook for name, hook in hooks.items()
                         if not _is_idle(hook) and name != 'visualization'}
    kept = None
    cfg.default_hooks['checkpoint'] = None  # or MMEngine adds its own
    if keep:
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

    Raises:
        LaunchError: The validation reports none.
    """
    for file in (cfg, method.options):  # a process that was not forked has read neither
        if file.get('custom_imports'):
            import_modules_from_strings(**file['custom_imports'])
    cfg = cell_config(cfg, method, cell, split, folder, keep)
    if cell.phase == 'cost':
        return count_costs(cfg)
    runner = build_runner(cfg)
    seen = _Metrics()
    runner.register_hook(seen)
    runner.train()
    # MMEngine's loops validate at their end; others may not.
    found = runner.val() if seen.metrics is None else seen.metrics
    numbers = {name: float(value) for name, value in found.items() if _is_number(value)}
    if not numbers:
        raise LaunchError('the validation reports no number, as that of a detector which finds '
                          'nothing')
    return numbers


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
    return dict(
        trained_backbone=_trained(model, True), trained=_trained(model, False), kept=kept_bytes,
        checkpoint=saved_bytes(model.state_dict()))


def saved_bytes(state: dict) -> int:
    """Bytes of the tensors in a state dict; what heads share (RTMDet's do) is saved once."""
    return sum({t.data_ptr(): t.numel() * t.element_size()
                for t in state.values() if torch.is_tensor(t)}.values())


def _trained(model: nn.Module, backbone: bool) -> int:
    return sum(p.numel() for name, p in model.named_parameters()
               if p.requires_grad and (not backbone or 'backbone' in name.split('.')))
