"""The prompted model of a config: whether it keeps its promises."""
from __future__ import annotations

import collections
import contextlib
import copy
import json
from pathlib import Path

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.runner import load_checkpoint
from torch import nn

from mmprotune import protune
from mmprotune.engine.hooks.stepping import before_step
from mmprotune.engine.processes import prepare_processes
from mmprotune.freezing import FrozenSnapshot, audit
from mmprotune.models import PromptedBackbone

from .configs import Run, runnable
from .failures import one_line
from .files import point
from .stock import build, take_step


def check_prompted(run: Run, folder: Path, stock: dict, insert: str | None = None) -> dict:
    """Builds the prompted model as ``--protune`` does and holds it to its promises.

    Args:
        run (Run): The run.
        folder (Path): Holds the files of the stock model.
        stock (dict): What :func:`~mmprotune.matrix.stock.check_stock` returned.
        insert (str, optional): Where prompts go. Defaults to None: where ``--protune`` puts them.

    Returns:
        dict: ``faults``: broken promises in words; ``prompts``: number of stages that have one;
        ``prompt_parameters``.
    """
    cfg = runnable(run.cfg)
    options = point(cfg, run.cfg, folder)
    if insert is not None:
        options['insert'] = insert
    named = 'prompt' in json.dumps((cfg.optim_wrapper.get('paramwise_cfg') or {}), default=str)
    protune(cfg, **options)
    prepare_processes(cfg)
    # The order of the Runner: model, optimizer, init_weights, load_from.
    model = build(cfg)
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    faults = []
    snapshot = FrozenSnapshot(model)

    def compare(after: str) -> None:
        nonlocal snapshot
        moved = snapshot.moved(model)
        if moved:
            faults.append(f'{after} moved {len(moved)} of {len(snapshot.digests)} frozen tensors: '
                          f'{", ".join(moved[:2])}')
            snapshot = FrozenSnapshot(model)

    model.init_weights()
    compare('init_weights()')
    if cfg.get('load_from'):
        # Of the same weights, which therefore stay.
        load_checkpoint(model, cfg.load_from, map_location='cpu')
        compare('load_from')

    prompts = _prompt_parameters(model)
    if not prompts:
        raise AssertionError('no prompt trains')
    if not named:
        paramwise = cfg.optim_wrapper.get('paramwise_cfg') or {}
        every_bias = (paramwise.get('custom_keys') or {}).get('bias') or {}
        faults += wrong_rates(wrapper.optimizer, prompts,
                              every_bias.get('lr_mult') or paramwise.get('bias_lr_mult') or 1.,
                              head_rate(wrapper.optimizer, model))
    # Prompts start at zero, and so do some heads, which lets no gradient through.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    without = set(prompts)
    before_step(wrapper.optimizer, lambda *_: without.difference_update(
        n for n, p in prompts.items() if p.grad is not None and p.grad.count_nonzero()))
    model.train()
    finite = take_step(model, cfg, stock['size'], wrapper)
    compare('the step')
    # The deepest features of small images have few pixels, or one, and may all be dead.
    for size in stock['larger'][:1] if without else ():
        with contextlib.suppress(Exception):
            take_step(model, cfg, size, wrapper)
            compare('another step')
    if stock['finite'] and not finite:
        faults.append('the loss is not finite, though that of the stock model is')
    if without:
        faults.append(f'no gradient for {len(without)} of {len(prompts)} prompt parameters: '
                      f'{", ".join(sorted(without)[:2])}')
    try:
        audit(model)
    except Exception as error:
        faults.append(one_line(error))
    return dict(faults=faults, prompts=sum(n.endswith('expand.weight') for n in prompts),
                prompt_parameters=sum(p.numel() for p in prompts.values()))


def _prompt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the prompts that train: a teacher's or an average's do not."""
    return {f'{path}.prompts.{name}': parameter
            for path, part in model.named_modules() if isinstance(part, PromptedBackbone)
            for name, parameter in part.prompts.named_parameters() if parameter.requires_grad}


def head_rate(optimizer: torch.optim.Optimizer, model: nn.Module) -> float | None:
    """The learning rate of most weights in what is called a head; None without one."""
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    counts: collections.Counter = collections.Counter()
    for name, parameter in model.named_parameters():
        if 'head' in name and 'backbone' not in name and id(parameter) in rates:
            counts[rates[id(parameter)]] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def wrong_rates(optimizer: torch.optim.Optimizer, prompts: dict[str, nn.Parameter],
                bias_lr_mult: float = 1., rate_of_heads: float | None = None) -> list[str]:
    """Says which prompts do not train at the head's rate.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        prompts (dict[str, nn.Parameter]): The prompts' parameters by name.
        bias_lr_mult (float): What a config gives all biases, the head's too. Defaults to 1.
        rate_of_heads (float, optional): Of :func:`head_rate`. Defaults to None: the base rate.

    Returns:
        list[str]: At most one sentence.
    """
    base = optimizer.defaults['lr'] if rate_of_heads is None else rate_of_heads
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    allowed = {n: {base, base * bias_lr_mult} if n.endswith('bias') else {base} for n in prompts}
    wrong = {n: rates.get(id(p)) for n, p in prompts.items() if rates.get(id(p)) not in allowed[n]}
    if not wrong:
        return []
    name, rate = next(iter(wrong.items()))
    told = 'is not in the optimizer' if rate is None else f'trains at {rate:g}'
    return [f"the rate of {len(wrong)} of {len(prompts)} prompt parameters is not the head's "
            f'rate {base:g}: {name} {told}']
