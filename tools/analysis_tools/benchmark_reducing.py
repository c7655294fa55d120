"""Counts what processes exchange in a training step, by method, and what part of it that takes.

Processes on this machine train the methods of configs/methods in turn, on the same noise images,
with DistributedDataParallel over gloo. Bytes and buckets are what that hands to the all-reduce;
checkpoints are counted by their tensors. With --steps, each step is run with reducing and without,
in turn; processor seconds are those of one process with all its threads, which other work on the
machine does not lengthen as it does a step. Then the arithmetic for more processes: 2 (n - 1) / n
times the bytes by the bandwidth of a link, which is what a ring takes where latency is nothing.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from mmprotune.comparison.methods import apply_method, read_method
from mmprotune.config_nodes import without_pretrained
from mmprotune.engine import cli
from mmprotune.engine.processes import prepare_processes
from mmprotune.errors import LaunchError
from mmprotune.testing.noise_batch import noise_batch

METHODS = Path(__file__).resolve().parents[2] / 'configs' / 'methods'
MIB = 2**20
# Bytes a second that one process, or one machine, sends over a link while it receives as many: the
# makers' figures, which no reduction reaches.
LINKS = {'NVLink, 450 GB/s': 450e9, 'InfiniBand, 200 Gbit/s': 25e9, 'Ethernet, 25 Gbit/s': 3.125e9}
PROCESSES = (8, 64, 512)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG',
                        help='of full fine-tuning, a file or an installed name (mmdet::…)')
    parser.add_argument('--methods', nargs='+', metavar='METHOD',
                        default=['full', 'head', 'stages', 'narrow', 'lora'],
                        help='of configs/methods, or files like those (default: %(default)s)')
    parser.add_argument('--processes', type=int, default=1, help='default: %(default)s')
    parser.add_argument('--steps', type=int, default=0,
                        help='timed steps of each kind and method; 0: bytes alone')
    parser.add_argument('--size', type=int, default=128, help='side of noise images, in pixels')
    parser.add_argument('--batch-size', type=int, default=2, help='images a process')
    parser.add_argument('--json', metavar='FILE', help='write all figures there')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='override keys of the config')
    args = parser.parse_args(argv)
    for option, least in (('processes', 1), ('steps', 0), ('size', 32), ('batch_size', 1)):
        if getattr(args, option) < least:
            parser.error(f'--{option.replace("_", "-")} must be at least {least}, '
                         f'got {getattr(args, option)}')
    return args


class Trained:
    """One method, ready to step, as one of several processes.

    Args:
        cfg (Config): Config of full fine-tuning.
        name (str): The method.
        args (argparse.Namespace): The command line.

    Raises:
        LaunchError: The method does not fit the backbone, or trains nothing.
    """

    def __init__(self, cfg: Config, name: str, args: argparse.Namespace) -> None:
        cfg = without_pretrained(apply_method(copy.deepcopy(cfg), read_method(name, METHODS)))
        if cfg.get('data_preprocessor') is not None:
            cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
        prepare_processes(cfg)
        torch.manual_seed(0)
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.checkpoint = sum(
            t.nbytes for t in self.model.state_dict().values() if isinstance(t, torch.Tensor))
        self._reduced: list[int] = []
        # As MMEngine's wrapper; its buckets are filled in the order of the first backward pass from
        # the second step on.
        self.wrapped = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.wrapped.register_comm_hook(None, self._reduce)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        batch = noise_batch(cfg, args.size, args.batch_size, np.random.default_rng(0))
        self.data = self.model.data_preprocessor(batch, True)
        for _ in range(2):
            self._reduced.clear()
            self.step()
        self.buckets = list(self._reduced)

    def _reduce(self, _, bucket):  # annotations in strings are not what PyTorch looks for
        self._reduced.append(bucket.buffer().nbytes)
        flat = bucket.buffer().div_(distributed.get_world_size())
        return distributed.all_reduce(flat, async_op=True).get_future().then(
            lambda done: done.value()[0])

    def step(self, reduce: bool = True) -> tuple[float, float]:
        """One training step that all processes begin together.

        Args:
            reduce (bool): Whether the gradients are reduced. Defaults to True.

        Returns:
            tuple[float, float]: Seconds, and processor seconds.
        """
        # Models note things on their samples, and draw regions.
        data = copy.deepcopy(self.data)
        torch.manual_seed(0)
        np.random.seed(0)
        distributed.barrier()
        start = _now()
        with contextlib.nullcontext() if reduce else self.wrapped.no_sync():
            self.model.parse_losses(self.wrapped(**data, mode='loss'))[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return _since(start)

    def reduce_alone(self) -> tuple[float, float]:
        """As :meth:`step`, of nothing but its all-reduces."""
        buffers = [torch.zeros(count // 4) for count in self.buckets]
        distributed.barrier()
        start = _now()
        for work in [distributed.all_reduce(buffer, async_op=True) for buffer in buffers]:
            work.wait()
        return _since(start)

    def counts(self) -> dict[str, int]:
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        return dict(parameters=sum(p.numel() for p in self.parameters),
                    gradients=sum(p.nbytes for p in self.parameters), reduced=sum(self.buckets),
                    buckets=len(self.buckets), checkpoint=self.checkpoint,
                    optimizer=sum(t.nbytes for t in state if isinstance(t, torch.Tensor)))


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    return tuple(after - before for before, after in zip(start, _now()))


def _work(rank: int, cfg: Config, args: argparse.Namespace, folder: str) -> None:
    """What one process does; the first one writes what was found."""
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    torch.set_num_threads(1)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/group', rank=rank,
                                   world_size=args.processes)
    methods, refused = {}, {}
    for name in args.methods:
        try:
            methods[name] = Trained(cfg, name, args)
        except LaunchError as error:
            refused[name] = str(error)
    kinds = dict(reducing=lambda method: method.step(),
                 without=lambda method: method.step(reduce=False),
                 alone=lambda method: method.reduce_alone())
    seconds = {name: {kind: [] for kind in kinds} for name in methods}
    for _ in range(args.steps):
        for name, method in methods.items():  # in turn: the machine's moods meet all alike
            for kind, run in kinds.items():
                seconds[name][kind].append(run(method))
    found = {name: dict(method.counts(), **shares(seconds[name]) if args.steps else {})
             for name, method in methods.items()}
    if rank == 0:
        Path(folder, 'found.json').write_text(json.dumps(dict(methods=found, refused=refused)))
    distributed.destroy_process_group()


def shares(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians, and the share of a step's processor seconds that reducing adds.

    Args:
        seconds (dict[str, list[tuple[float, float]]]): Seconds and processor seconds of steps with
            reducing (``reducing``) and ``without``, and of reducing ``alone``.

    Returns:
        dict[str, float]: ``step``, seconds; the others, processor seconds; and ``share``.
    """
    found = {kind: statistics.median(processor for _, processor in values)
             for kind, values in seconds.items()}
    return dict(found, step=statistics.median(wall for wall, _ in seconds['reducing']),
                share=1 - found['without'] / found['reducing'])


def ring_seconds(count: int, processes: int, bandwidth: float) -> float:
    """Seconds that a ring takes to reduce: each process sends its part twice round.

    Args:
        count (int): Bytes to reduce.
        processes (int): How many.
        bandwidth (float): Of a link, bytes a second.
    """
    return 2 * (processes - 1) / processes * count / bandwidth


def measure(args: argparse.Namespace) -> dict:
    """Counts, and times where ``--steps`` says so.

    Args:
        args (argparse.Namespace): The command line.

    Returns:
        dict: ``methods``: figures by method; ``refused``: why a method does not fit.
    """
    for name in args.methods:
        read_method(name, METHODS)
    cfg = cli.load_config(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    for owner in (cfg.get('data_preprocessor'), cfg.model.get('data_preprocessor')):
        if owner and owner.get('size') is not None:
            owner['size'] = (args.size, args.size)
    with tempfile.TemporaryDirectory() as folder:
        # A forked process has all imports done.
        multiprocessing.start_processes(
            _work, (cfg, args, folder), nprocs=args.processes, start_method='fork')
        return json.loads(Path(folder, 'found.json').read_text())


def table(found: dict) -> str:
    """The figures as text, a line a method, and how long their reduction takes elsewhere."""
    rows = [('', 'trains', 'reduced MiB', 'buckets', 'weights MiB', 'with AdamW')]
    timed = any('share' in figures for figures in found.values())
    if timed:
        rows[0] += ('step s', 'processor s', 'without', 'alone', 'share')
    for name, f in found.items():
        row = (name, f'{f["parameters"]:,}', f'{f["reduced"] / MIB:.2f}', str(f['buckets']),
               f'{f["checkpoint"] / MIB:.2f}', f'{(f["checkpoint"] + f["optimizer"]) / MIB:.2f}')
        if timed:
            row += (*(f'{f[key]:.3f}' for key in ('step', 'reducing', 'without', 'alone')),
                    f'{f["share"]:.1%}')
        rows.append(row)
    rows.append(('', ) * len(rows[0]))
    text = _aligned(rows)
    rows = [('ms to reduce', *(f'{n} processes' for n in PROCESSES))]
    for link, bandwidth in LINKS.items():
        rows += [(f'{link}: {name}', *(
            f'{1000 * ring_seconds(f["reduced"], n, bandwidth):.2f}' for n in PROCESSES))
            for name, f in found.items()]
    return f'{text}\n{_aligned(rows)}'


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(row, widths))).rstrip()
                     for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints, writes.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    MMLogger.get_current_instance().setLevel(logging.WARNING)
    result = measure(args)
    if not result['methods']:
        raise LaunchError(f'--methods: none fits: {"; ".join(result["refused"].values())}')
    for why in result['refused'].values():
        print(f'left out: {why}')
    print(f'{args.config}, {args.processes} process{"es" * (args.processes > 1)}, '
          f'{args.batch_size} images each')
    print(table(result['methods']))
    if args.json:
        about = dict(config=args.config, torch=torch.__version__, python=platform.python_version(),
                     device=f'{platform.machine()} CPU', processes=args.processes,
                     size=args.size, batch_size=args.batch_size, steps=args.steps)
        Path(args.json).write_text(json.dumps(dict(about=about, **result), indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
