"""Measures what a training step costs: full fine-tuning, head only, and Pro-tuning, naive and lean.

For each config, on the same noise images: the bytes that autograd keeps for the backward pass
(counted by storage, parameters and buffers excluded) by stage, prompts, neck and head; peak memory;
seconds of forward, backward and optimizer and of inference, the variants taking turns; bytes of
optimizer state, and of gradients that processes would exchange; on a GPU, kernels of a step.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import json
import logging
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model.efficient_conv_bn_eval import (
    efficient_conv_bn_eval_control,
    turn_on_efficient_conv_bn_eval,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprotune.config_nodes import type_name, without_pretrained
from mmprotune.engine import cli
from mmprotune.engine.processes import prepare_processes
from mmprotune.lean import onednn
from mmprotune.lean.dry_run import tensors_in
from mmprotune.lean.memory import KeptBytes
from mmprotune.testing.noise_batch import noise_item

VARIANTS = ('full', 'frozen', 'naive', 'lean')
TITLES = dict(full='full fine-tuning', frozen='head only', naive='prompted, naive',
              lean='prompted, lean', lora='LoRA', compiled='lean, compiled',
              budget='lean, compiled, half', with_cp='full, with_cp',
              naive_with_cp='naive, with_cp', efficient_conv_bn_eval='full, conv_bn_eval')
# What the hosts have themselves to keep less: the backbone's blocks computed twice, and
# convolution and BatchNorm as one.
HOSTS = ('with_cp', 'naive_with_cp', 'efficient_conv_bn_eval')
# What `compile` of these variants adds to the config's own and to --compile.
COMPILED = dict(compiled={}, budget=dict(activation_memory_budget=0.5))
# What --ablate takes out of the lean variant, one at a time.
PARTS = ('product', )
TITLES.update({f'without {part}': f'lean, without {part}' for part in PARTS})
MIB = 2**20
# Linear layers of attention, as the three libraries name them; where attention has none, the MLP's.
LORA_TARGETS = ((r'.*qkv', r'.*\.proj'), (r'.*ffn.*', ))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', metavar='CONFIG',
                        help='prompted or stock configs, files or installed names (mmdet::…)')
    parser.add_argument('--variants', nargs='+', choices=[*VARIANTS, 'lora', *COMPILED, *HOSTS],
                        default=VARIANTS,
                        help='lora: mmpretrain.LoRAModel around the backbone, as a peer; compiled: '
                        'lean, by torch.compile; budget: with half of what that keeps; with_cp, '
                        "naive_with_cp: full and naive with the host's activation checkpointing; "
                        "efficient_conv_bn_eval: full with MMEngine's option of that name")
    parser.add_argument('--compile', nargs='+', action=DictAction, default={},
                        help='options of `compile` for the compiled variants; '
                        'backend=aot_eager_decomp_partition counts bytes without a C++ compiler')
    parser.add_argument('--ablate', action='store_true',
                        help='also the lean variant without oneDNN for linear layers (product)')
    parser.add_argument('--backbone-only', action='store_true',
                        help='no neck and head; the loss is the mean of the features')
    parser.add_argument('--data', action='store_true',
                        help="the first images of the config's own training set, not noise")
    parser.add_argument('--size', type=int, default=512, help='side of noise images, in pixels')
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--steps', type=int, default=5, help='timed steps a variant; 0: none')
    parser.add_argument('--no-inference', action='store_true',
                        help='time training steps alone; inference is compiled by itself')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--channels-last', action='store_true',
                        help='images of every variant in that memory format')
    parser.add_argument('--amp', choices=['bfloat16', 'float16'], help='train under autocast')
    parser.add_argument('--json', metavar='FILE', help='write all figures there')
    parser.add_argument('--plot', metavar='PNG', help='draw the kept bytes there')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override keys of the configs')
    args = parser.parse_args(argv)
    if args.ablate:
        args.variants = [*args.variants, *(f'without {part}' for part in PARTS)]
    for option, least in (('size', 32), ('batch_size', 1), ('steps', 0)):
        if getattr(args, option) < least:
            parser.error(f'--{option.replace("_", "-")} must be at least {least}, '
                         f'got {getattr(args, option)}')
    return args


# --- variants ---------------------------------------------------------------------------------


def variant_cfg(cfg: Config, variant: str, options: dict | None = None) -> Config:
    """The config with another way to train its backbone, and no pre-trained file.

    Args:
        cfg (Config): A config with a prompted backbone.
        variant (str): One of ``VARIANTS``, 'lora', one of ``COMPILED`` or ``HOSTS``, or
            'without …', see ``PARTS``.
        options (dict, optional): More options of ``compile`` for the compiled ones. Defaults to
            None.

    Returns:
        Config: A copy.
    """
    cfg = without_pretrained(copy.deepcopy(cfg))
    prompted = cfg.model.backbone
    if variant.endswith('with_cp'):
        prompted.backbone.with_cp = True
    if variant in ('full', 'lora', 'with_cp', 'efficient_conv_bn_eval'):
        cfg.model.backbone = prompted.backbone
    elif variant == 'frozen':
        cfg.model.backbone = dict(prompted, prompt=None, lean=False, compile=False)
    else:
        lean = prompted.get('lean', True) or True
        own = prompted.get('compile', False)
        compile_ = False if variant not in COMPILED else {
            **({} if isinstance(own, bool) else own), **(options or {}), **COMPILED[variant]}
        cfg.model.backbone = dict(
            prompted, lean=False if variant.startswith('naive') else lean, compile=compile_)
    return cfg


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    """While open, lean layers do not use the oneDNN product.

    Args:
        part (str): One of ``PARTS``; anything else changes nothing.
    """
    own = getattr(onednn, part, None)
    if own is not None:
        setattr(onednn, part, lambda *_: None)
    try:
        yield
    finally:
        if own is not None:
            setattr(onednn, part, own)


def lora(backbone: dict) -> nn.Module | None:
    """Builds ``mmpretrain.LoRAModel`` around a backbone, rank 16.

    Args:
        backbone (dict): Its config.

    Returns:
        nn.Module, optional: None where there is no linear layer to adapt.
    """
    from mmpretrain.models.peft import LoRAModel
    for targets in LORA_TARGETS:
        with contextlib.suppress(ValueError):
            return LoRAModel(backbone, alpha=16, rank=16, targets=[dict(type=t) for t in targets])
    return None


def fuse_norms(model: nn.Module) -> str | None:
    """Turns MMEngine's ``efficient_conv_bn_eval`` on for a model's backbone.

    Args:
        model (nn.Module): The model, in training mode; changed in place.

    Returns:
        str, optional: Why that changes nothing, None where it does.
    """
    if all(norm.training for norm in model.backbone.modules() if isinstance(norm, _BatchNorm)):
        return 'no BatchNorm that stands still'
    try:
        turn_on_efficient_conv_bn_eval(model, 'backbone')
    except Exception as error:  # its tracer follows few networks
        return f'torch.fx does not trace it ({type(error).__name__})'
    graph = model.backbone.forward.__self__.graph
    if not any(node.target is efficient_conv_bn_eval_control for node in graph.nodes):
        return 'no convolution with a BatchNorm behind it'
    return None


def draw_batch(cfg: Config, args: argparse.Namespace) -> dict:
    """The same batch for every variant: noise, or the first images of the training set."""
    rng = np.random.default_rng(0)
    if not args.data:
        return pseudo_collate([noise_item(cfg, args.size, rng) for _ in range(args.batch_size)])
    np.random.seed(0)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return pseudo_collate([dataset[i] for i in range(args.batch_size)])


class Backbone(nn.Module):
    """A backbone alone, with a loss that reads all of its features and keeps nothing."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return sum(t.float().mean() for t in tensors_in(self.backbone(images)))


class Variant:
    """One way to train, ready to step.

    Args:
        cfg (Config): Its config.
        name (str): As of :func:`variant_cfg`.
        args (argparse.Namespace): The command line.
    """

    def __init__(self, cfg: Config, name: str, args: argparse.Namespace) -> None:
        self.name, self.device = name, torch.device(args.device)
        self._without = name.partition('without ')[2]
        self.amp = getattr(torch, args.amp) if args.amp else None
        self._memory_format = (
            torch.channels_last if args.channels_last else torch.contiguous_format)
        torch.manual_seed(0)
        self.lacks: str | None = None  # why there is no such variant
        try:
            model = MODELS.build(cfg.model)
        except TypeError as error:
            if "'with_cp'" not in str(error):
                raise
            self.lacks = 'no with_cp'
            return
        if name == 'lora':
            model.backbone = lora(cfg.model.backbone)
            self.lacks = None if model.backbone is not None else 'no linear layers'
        if name == 'efficient_conv_bn_eval':
            self.lacks = fuse_norms(model.train())
        if self.lacks:
            return
        for block in getattr(model.backbone, 'prompts', {}).values():
            for parameter in block.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)  # as after some training
        batch = draw_batch(cfg, args)
        if args.backbone_only:
            model.data_preprocessor.to(self.device)
            images = model.data_preprocessor(copy.deepcopy(batch), True)['inputs']
            images = images.contiguous(memory_format=self._memory_format)
            self.model = Backbone(model.backbone)
            self._loss: Callable = lambda: self.model(images)
            self._infer: Callable = lambda: self.model.backbone(images)
        else:
            self.model = model
            self._batch = batch
            self._loss = self._model_loss
            self._infer = lambda: self.model(**self._data(), mode='tensor')
        self.model.to(self.device).train()
        # A baseline whose backbone is all there is has nothing to train.
        self.trains = any(p.requires_grad for p in self.model.parameters())
        self.optimizer = build_optim_wrapper(
            self.model, dict(type='OptimWrapper', optimizer=dict(
                type='AdamW', lr=1e-5))).optimizer if self.trains else None

    def _model_loss(self) -> torch.Tensor:
        # The same regions for every variant.
        torch.manual_seed(0)
        np.random.seed(0)
        data = self._data()
        with torch.autocast(self.device.type, self.amp, enabled=False):
            losses = self.model(**data, mode='loss')
            return self.model.parse_losses(losses)[0]

    def _data(self) -> dict:
        data = self.model.data_preprocessor(copy.deepcopy(self._batch), self.model.training)
        data['inputs'] = data['inputs'].contiguous(memory_format=self._memory_format)
        return data

    def loss(self) -> torch.Tensor:
        """The loss, in its graph."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None), \
                without(self._without):
            return self._loss()

    def step(self) -> tuple[float, float, float]:
        """One training step; seconds of forward, backward and optimizer."""
        times = [self._now()]
        loss = self.loss()
        times.append(self._now())
        if self.trains:
            with without(self._without):
                loss.backward()
        times.append(self._now())
        if self.trains:
            self.optimizer.step()
            self.optimizer.zero_grad()
        times.append(self._now())
        return tuple(b - a for a, b in zip(times, times[1:]))

    def infer(self) -> float:
        """Seconds of one forward pass in eval mode, without a graph and what follows the network's
        outputs."""
        self.model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, self.amp,
                                             enabled=self.amp is not None), \
                without(self._without):
            start = self._now()
            self._infer()
            seconds = self._now() - start
        self.model.train()
        return seconds

    def _now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()


# --- measuring --------------------------------------------------------------------------------


def stage_finder(model: nn.Module) -> Callable[[str], str]:
    """From the dotted name of a module in any variant to the part of the model that it belongs to.

    Args:
        model (nn.Module): A prompted variant, which knows where stages end.

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
        args (argparse.Namespace): The command line.

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

    part = stage_finder(Variant(variant_cfg(cfg, 'naive'), 'naive', args).model)
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


# --- output -----------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The figures of one config as text, a line a variant."""
    found = result['variants']
    rows = [('', 'kept MiB', 'alloc MiB', 'peak MiB', 'step s', 'min-max', 'fwd', 'bwd', 'opt',
             'infer s', 'kernels', 'state MiB', 'reduce MiB')]
    for name, f in found.items():
        timed = 'step' in f
        rows.append((
            TITLES[name], _mib(f['kept_total']), _mib(f['allocated']), _mib(f['peak']),
            f'{f["step"]:.3f}' if timed else '-',
            f'{f["fastest"]:.2f}-{f["slowest"]:.2f}' if timed else '-',
            *(f'{f[key]:.3f}' if key in f else '-'
              for key in ('forward', 'backward', 'optimizer', 'inference')),
            f'{f["kernels"]:,}' if f.get('kernels') else '-',
            _mib(f['optimizer_state']), _mib(f['gradients'])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [result['config']]
    for row in rows:
        lines.append('  '.join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(row, widths))))
    if 'lean' in found:
        lean = found['lean']
        for other in ('full', 'naive', 'frozen', *HOSTS, *(f'without {part}' for part in PARTS)):
            if other not in found:
                continue
            f = found[other]
            ratios = [(key, lean[key] / f[key]) for key in (
                'kept_total', 'allocated', 'step', 'inference', 'kernels')
                      if lean.get(key) and f.get(key)]
            lines.append(f'lean of {TITLES[other]}: ' + ', '.join(
                f'{dict(kept_total="kept", allocated="alloc").get(key, key)} {ratio:.3f}'
                for key, ratio in ratios))
    return '\n'.join(lines)


def _mib(count: int | None) -> str:
    return '-' if count is None else f'{count / MIB:.1f}'


def plot(results: list[dict], file: str) -> None:
    """Draws the kept bytes as stacked bars, a group for each config.

    Args:
        results (list[dict]): What :func:`measure` returned.
        file (str): PNG to write.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    parts = sorted({p for r in results for f in r['variants'].values() for p in f['kept']},
                   key=lambda p: (('neck', 'prompts', 'head').index(p) + 1 if p in (
                       'neck', 'prompts', 'head') else 0, p))
    colours = pyplot.get_cmap('viridis')(np.linspace(0, 0.95, len(parts)))
    figure, axes = pyplot.subplots(
        1, len(results), figsize=(1 + 3.7 * len(results), 4.2), squeeze=False)
    for axis, result in zip(axes[0], results):
        names = list(result['variants'])
        base = np.zeros(len(names))
        for part, colour in zip(parts, colours):
            height = np.array([result['variants'][n]['kept'].get(part, 0) / MIB for n in names])
            axis.bar(range(len(names)), height, bottom=base, color=colour, label=part)
            base += height
        for i, top in enumerate(base):
            axis.annotate(f'{top:.0f}', (i, top), ha='center', va='bottom', fontsize=8)
        axis.set_xticks(range(len(names)), [TITLES[n].replace(', ', ',\n').replace(' ', '\n', 1)
                                            for n in names], fontsize=8)
        axis.set_title(Path(result['config']).stem, fontsize=8)
        axis.margins(y=0.08)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0][0].set_ylabel('MiB kept for the backward pass')
    axes[0][-1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel(logging.WARNING)  # not the weights' initialisation
    results = []
    for config in args.configs:
        results.append(measure(config, args))
        print(table(results[-1]), end='\n\n', flush=True)
    if args.plot:
        plot(results, args.plot)
    if args.json:
        about = dict(torch=torch.__version__, python=platform.python_version(),
                     device=torch.cuda.get_device_name() if args.device.startswith('cuda')
                     else f'{platform.machine()} CPU', threads=torch.get_num_threads(),
                     size=None if args.data else args.size, batch_size=args.batch_size,
                     amp=args.amp, channels_last=args.channels_last,
                     backbone_only=args.backbone_only, steps=args.steps)
        Path(args.json).write_text(json.dumps(dict(about=about, results=results), indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
