"""What the processes of these tests do: ``tools/train.py`` and ``tools/test.py``, watched.

The process from which they are forked imports this module first, so that they start at once.
"""
from __future__ import annotations

import builtins
import math
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

# Slow to import, and needed by each of them.
import mmdet.datasets.transforms
import mmdet.engine
import mmdet.evaluation
import mmdet.models
import mmdet.visualization  # noqa: F401
import mmengine.hooks.checkpoint_hook as checkpoint_hook
import torch
from mmcv.transforms import BaseTransform
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, TRANSFORMS
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mmprotune import FrozenSnapshot
from mmprotune.checkpoints import writing
from mmprotune.engine import cli
from mmprotune.engine.hooks import freeze_guard_hook
from mmprotune.engine.hooks.stepping import before_step
from tests.test_tools.conftest import load_tool

_beacon: Connection | None = None


@HOOKS.register_module(force=True)
class Beacon(Hook):
    """Tells the test how far training is: once before and once after each iteration."""
    priority = 'LOWEST'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if _beacon is not None:
            _beacon.send(('before', runner.iter))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if _beacon is not None:
            _beacon.send(('after', runner.iter))


@HOOKS.register_module(force=True)
class Recorder(Hook):
    """Writes down what a rank computed: gradients of each step, weights and digests at the end,
    bytes that were reduced. In ``<work_dir>/rank<rank>.pth``."""
    priority = 'VERY_LOW'

    def before_train(self, runner):
        self.gradients, self.reduced = [], []
        wrapped = is_model_wrapper(runner.model)
        self.model = runner.model.module if wrapped else runner.model
        self.unused = wrapped and runner.model.find_unused_parameters
        if wrapped:
            runner.model.register_comm_hook(None, self._count)
        before_step(runner.optim_wrapper.optimizer, self._note)

    def _count(self, state, bucket):
        self.reduced[-1] += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(None, bucket)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.reduced.append(0)

    def _note(self, optimizer, args, kwargs):
        self.gradients.append({
            n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def after_train(self, runner):
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        torch.save(dict(
            gradients=self.gradients, reduced=self.reduced, unused=self.unused,
            trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
            all_bytes=sum(p.numel() * p.element_size() for p in self.model.parameters()),
            digests=FrozenSnapshot(self.model).digests,
            weights=self.model.state_dict()), f'{runner.work_dir}/rank{get_rank()}.pth')


@HOOKS.register_module(force=True)
class Meter(Hook):
    """Writes iteration, resident bytes and open files down every tenth iteration."""
    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % 10 == 0:
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            resident = pages * os.sysconf('SC_PAGESIZE')
            row = runner.iter + 1, resident, len(os.listdir('/proc/self/fd'))
            with open(f'{runner.work_dir}/meter.csv', 'a') as file:
                print(*row, sep=',', file=file)


@HOOKS.register_module(force=True)
class Mortal(Hook):
    """Kills its process once, before an iteration of one rank."""

    def __init__(self, rank, iteration, mark):
        self.rank, self.iteration, self.mark = rank, iteration, Path(mark)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (get_rank(), runner.iter) == (self.rank, self.iteration) and not self.mark.exists():
            self.mark.touch()
            _kill_self()


@TRANSFORMS.register_module(force=True)
class DrawNaN(BaseTransform):
    """Makes one value of one picture no number."""

    def __init__(self, img_id):
        self.img_id = img_id

    def transform(self, results):
        if results['img_id'] == self.img_id:
            results['img'] = results['img'].astype('float32')
            results['img'][3, 4] = math.nan
        return results


def run_tool(name: str, argv: list[str], log: str, env: dict[str, str] | None = None,
             beacon: Connection | None = None, die: tuple | None = None,
             size_limit: int | None = None, version: str | None = None) -> None:
    """Runs a tool as its command line would, in a process of its own.

    Args:
        name (str): 'train.py' or 'test.py'.
        argv (list[str]): Its arguments.
        log (str): File for what it prints.
        env (dict[str, str], optional): Environment variables.
        beacon (Connection, optional): See :class:`Beacon`.
        die (tuple, optional): See :func:`die_while_saving`.
        size_limit (int, optional): The most bytes that a file may have (RLIMIT_FSIZE).
        version (str, optional): Of mmprotune, as this process sees it.
    """
    global _beacon
    _beacon = beacon
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env or {})
    sys.argv = [name, *argv]
    if version is not None:
        freeze_guard_hook.__version__ = version
    if die is not None:
        die_while_saving(*die)
    if size_limit is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, size_limit))
    status = cli.run_tool(lambda: load_tool(name).main(argv))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as a process ends that has nothing to tell its parent


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_saving(step: str, nth: int, fraction: float) -> None:
    """Makes this process kill itself inside its nth save from now.

    Args:
        step (str): 'write' (after a part of the bytes), 'sync', 'rename', 'renamed' (right after
            it), or 'note' (with ``last_checkpoint`` emptied and not yet written).
        nth (int): From 1.
        fraction (float): Of the bytes, for 'write'.
    """
    saves = [0]

    def due() -> bool:
        saves[0] += 1
        return saves[0] == nth

    if step == 'write':

        def opened(path, mode='r', *args, **kwargs):
            file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115
            if mode == 'wb' and due():
                writing._lock(file)
                real = file.write

                class Torn:

                    def write(self, data):
                        real(data[:int(len(data) * fraction)])
                        file.flush()
                        _kill_self()

                    def __enter__(self):
                        return self

                    def __exit__(self, *exc_info):
                        file.close()

                    def __getattr__(self, name):
                        return getattr(file, name)

                return Torn()
            return file

        writing.open = opened
    elif step == 'note':

        def noted(path, mode='r', *args, **kwargs):
            file = builtins.open(path, mode, *args, **kwargs)  # noqa: SIM115
            if str(path).endswith('last_checkpoint') and due():
                _kill_self()
            return file

        checkpoint_hook.open = noted
    else:
        os_of_writing = _Os(step, due)
        writing.os = os_of_writing


class _Os:
    """The module ``os``, with a death on the way."""

    def __init__(self, step, due):
        self._step, self._due = step, due

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        if self._step == 'sync' and self._due():
            _kill_self()
        os.fsync(descriptor)

    def replace(self, source, target):
        if self._step == 'rename' and self._due():
            _kill_self()
        os.replace(source, target)
        if self._step == 'renamed' and self._due():
            _kill_self()
