"""Measures variants: bytes kept for the backward pass, peaks of memory, kernels and seconds."""
from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import init_default_scope
from torch import nn

from mmprotune.config_nodes import type_name
from mmprotune.engine import cli
from mmprotune.engine.processes import prepare_processes
from mmprotune.lean.memory import KeptBytes

from .variants import COMPILED, TITLES, Variant, variant_cfg


def stage_finder(model: nn.Module) -> Callable[[str], str]:
    """From the dotted name of a module in any variant to the part of the model that it belongs to.

    Args:
        model (nn.Module): A prompted variant with prompts at stage ends.

    Returns:
        Callable: 'stage1', …, 'prompts', 'neck', or 'head' for what is no other part.
    """
    backbone = model.backbone
    order = {path: i for i, (path, _) in enumerate(backbone.backbone.named_modules())}
    ends = {}  # by the last module inside the one that ends a stage
    for stage in backbone.stages:
        inside = [i for path, i in order.items() if f'{path}.'.startswith(f'{stage.path}.')]
        ends[max(inside)] = stage.name.partition('_')[0]

    def part(path: str) -> str:
        words = path.split('.')
        if words[0] != 'backbone':
            return 'neck' if words[0] == 'neck' else 'head'
        if words[1:2] == ['prompts']:
            return 'prompts'
        path = '.'.join(w for w in words[1:] if w not in ('backbone', 'module', 'original_layer')
                        and not w.startswith('lora_'))
        place = order.get(path, len(order))
        return next((name for end, name in sorted(ends.items()) if place <= end), 'output norms')

    return part


def kept_bytes(variant: Variant, part: Callable[[str], str]) -> dict[str, int]:
    """Bytes kept for the backward pass of one step, by part of the model; as one part in a variant
    that is compiled."""
    if variant.name in COMPILED:
        variant.loss()  # compiles it
        with KeptBytes(variant.model, by_module=False) as kept:
            loss = variant.loss()
        total = kept.total()
        del loss
        return dict(compiled=total)
    with KeptBytes(variant.model) as kept:
        loss = variant.loss()
    counted: Counter[str] = Counter()
    for path, count in kept.by_module().items():
        # Traced, a convolution with its norm is no module.
        traced = variant.name == 'efficient_conv_bn_eval' and path.startswith('backbone')
        counted['backbone' if traced else part(path)] += count
    del loss
    return dict(counted)


def peak_memory(variant: Variant) -> int | None:
    """Most bytes that one step takes at a time, beside what is there before it.

    By CUDA's allocator; on a CPU from the resident set, None where Linux does not let us reset its
    peak.
    """
    gc.collect()
    if variant.device.type == 'cuda':
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.step()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL('libc.so.6').malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return None
    before = _resident('VmRSS')
    variant.step()
    return max(0, _resident('VmHWM') - before)


def peak_allocated(variant: Variant) -> int | None:
    """Most bytes that one step allocates at a time through PyTorch, beside what is there before it.

    On a CPU an exact count, by PyTorch's profiler; None where that does not tell.
    """
    if variant.device.type == 'cuda':
        return peak_memory(variant)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profiler:
        variant.step()
    try:
        events = profiler.profiler.kineto_results.events()  # the one place with every allocation
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())
                   if e.name() == '[memory]']
    except AttributeError:
        return None
    return int(np.cumsum(changes).max(initial=0))


def kernels(variant: Variant) -> int | None:
    """How many kernels one step starts on a GPU; None on a CPU."""
    if variant.device.type != 'cuda':
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        variant.step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA and not
               event.name.startswith(('Memcpy', 'Memset')) for event in profiler.events())


def _resident(field: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{field}:'):
            return int(line.split()[1]) * 1024
    return 0


def measure(config: str, args: argparse.Namespace) -> dict:
    """Measures every variant of one config.

    Args:
        config (str): Its name.
        args (argparse.Namespace): Of ``benchmark_training.py``.

    Returns:
        dict: ``config`` and ``variants``: for each its figures.
    """
    cfg = cli.load_config(config)
    if type_name(cfg.model.backbone) != 'PromptedBackbone':
        cfg = cli.wrap_config(cfg)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    prepare_processes(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    for owner in (cfg.model.get('data_preprocessor'), cfg.model.backbone.backbone):
        for key in ('size', 'img_size'):
            if not args.data and owner and owner.get(key) is not None:
                owner[key] = (args.size, args.size)

    at_ends = variant_cfg(cfg, 'naive')
    at_ends.model.backbone.insert = 'stages'  # wherever the others have their prompts
    part = stage_finder(Variant(at_ends, 'naive', args).model)
    variants = [Variant(variant_cfg(cfg, name, args.compile), name, args) for name in args.variants]
    for variant in (v for v in variants if v.lacks):
        print(f'{config}: {variant.lacks}, so no {TITLES[variant.name]}')
    variants = [v for v in variants if not v.lacks]
    found = {}
    for variant in variants:
        kept = kept_bytes(variant, part)
        variant.step()  # the optimizer's state comes with its first step
        state = variant.optimizer.state.values() if variant.trains else ()
        found[variant.name] = dict(
            kept=kept, kept_total=sum(kept.values()), peak=peak_memory(variant),
            allocated=peak_allocated(variant), kernels=kernels(variant),
            trainable=sum(p.numel() for p in variant.model.parameters() if p.requires_grad),
            optimizer_state=sum(t.nbytes for s in state for t in s.values()
                                if isinstance(t, torch.Tensor)),
            gradients=sum(p.nbytes for p in variant.model.parameters() if p.requires_grad))
    times = {variant.name: [] for variant in variants}
    inference = {variant.name: [] for variant in variants}
    for _ in range(args.steps):
        for variant in variants:  # in turn: the machine's moods meet all alike
            times[variant.name].append(variant.step())
        for variant in () if args.no_inference else variants:
            inference[variant.name].append(variant.infer())
    for name, steps in times.items():
        if steps:
            totals = [sum(step) for step in steps]
            found[name].update(
                {key: statistics.median(column) for key, column in zip(
                    ('forward', 'backward', 'optimizer'), zip(*steps))},
                step=statistics.median(totals), fastest=min(totals), slowest=max(totals))
        if inference[name]:
            found[name].update(
                inference=statistics.median(inference[name]),
                inference_fastest=min(inference[name]), inference_slowest=max(inference[name]))
    return dict(config=config, variants=found)
