"""Measures what a training step costs: full fine-tuning, head only, and Pro-tuning, naive and lean.

For each config, on the same noise images: the bytes that autograd keeps for the backward pass
(counted by storage, parameters and buffers excluded) by stage, prompts, neck and head; peak memory;
seconds of forward, backward and optimizer and of inference, the variants taking turns; bytes of
optimizer state, and of gradients that processes would exchange; on a GPU, kernels of a step.
"""
from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger

from mmprotune.benchmark.measuring import measure
from mmprotune.benchmark.report import plot, table
from mmprotune.benchmark.variants import COMPILED, HOSTS, PARTS, VARIANTS
from mmprotune.engine import cli


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
