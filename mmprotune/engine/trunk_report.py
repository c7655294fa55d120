"""What the tasks of a trunk share, and where nothing, why."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from mmprotune.engine.task import Task
from mmprotune.errors import listed
from mmprotune.lean.dry_run import image_shapes, noise
from mmprotune.models.session import Session
from mmprotune.models.sharing import equal
from mmprotune.models.trunk import Trunk

# Sizes (H, W) of the images that tell whether preprocessings agree: lying, standing, odd ones.
PROBES = ((120, 160), (163, 101))


@dataclass
class TrunkEntry:
    """One trunk in a report.

    Attributes:
        kind (str): Class of the backbone.
        fingerprint (str): Hexadecimal.
        nbytes (int): Of the frozen tensors, which are in memory once.
        own_bytes (dict[str, int]): By task name, of everything else: prompts, neck, head.
    """
    kind: str
    fingerprint: str
    nbytes: int
    own_bytes: dict[str, int]


@dataclass
class TrunkReport:
    """What the tasks of a :class:`FrozenTrunk` share.

    Attributes:
        trunks (list[TrunkEntry]): The trunks.
        pairs (dict[tuple[str, str], str]): For two tasks of one trunk, what of a pass the second
            one does not run again where both are run on one image, or why nothing.
    """
    trunks: list[TrunkEntry] = field(default_factory=list)
    pairs: dict[tuple[str, str], str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for trunk in self.trunks:
            own = ', '.join(f'{name} (+{_size(n)})' for name, n in trunk.own_bytes.items())
            lines.append(f'{trunk.kind} {trunk.fingerprint[:16]}…, {_size(trunk.nbytes)} frozen, '
                         f'once for {len(trunk.own_bytes)} tasks: {own}')
            lines += [f'  {first} and {second} share {what}'
                      for (first, second), what in self.pairs.items() if first in trunk.own_bytes]
        if len(self.trunks) > 1:
            lines.append(f'{len(self.trunks)} trunks: their backbones hold different weights, so '
                         'nothing is shared between them')
        return '\n'.join(lines) or 'no tasks'


def report_on(tasks: Sequence[Task],
              session_of: Callable[[list[Task]], Session]) -> TrunkReport:
    """Runs every pair of tasks of a trunk on noise.

    Args:
        tasks (Sequence[Task]): All tasks.
        session_of (Callable): Makes a session in which the tasks of a list share.
    """
    report = TrunkReport()
    for trunk in {task.trunk: None for task in tasks}:
        of = [task for task in tasks if task.trunk is trunk]
        report.trunks.append(TrunkEntry(
            trunk.kind, trunk.key, trunk.nbytes,
            {task.name: _own_bytes(task, trunk) for task in of}))
        for i, first in enumerate(of):
            for second in of[i + 1:]:
                report.pairs[first.name, second.name] = _compare(first, second, session_of)
    return report


def _compare(first: Task, second: Task, session_of: Callable[[list[Task]], Session]) -> str:
    taken = _try_out(first, second, session_of)
    why = _difference(first, second)
    if why is not None:
        return f'nothing: {why}'
    if not taken:
        kinds = [f'{type(t.part.backbone).__module__.partition(".")[0]}.'
                 f'{type(t.part.backbone).__name__}' for t in (first, second)]
        if type(first.part.backbone) is not type(second.part.backbone):
            return (f'nothing: their backbones are of two classes, {kinds[0]} and {kinds[1]}, '
                    'with equal weights; one name in both configs would let them share')
        return 'nothing: their backbones are built otherwise from the first layer on'
    if taken == ['']:
        return 'the whole backbone'
    return f'the backbone up to where they part: {listed(taken, most=8)}'


def _try_out(first: Task, second: Task,
             session_of: Callable[[list[Task]], Session]) -> list[str]:
    """The modules that the second one of two tasks does not run, of the same input."""
    for _ in range(2):  # the first run finds out what has to be copied
        session = session_of([first, second])
        for task in (first, second):
            with torch.inference_mode(False), torch.no_grad(), task.lock, session.task(task.name):
                for shape in image_shapes(task.part.backbone):
                    with contextlib.suppress(Exception):  # not at this size
                        task.part(noise(task.part, shape, 1))
                        break
    return [path for _, path in session.taken[second.name]]


def _size(nbytes: int) -> str:
    return f'{nbytes / 2**20:.1f} MiB'


def _own_bytes(task: Task, trunk: Trunk) -> int:
    frozen = {tensor.data_ptr() for tensor in trunk.tensors.values()}
    tensors = {t.data_ptr(): t.nbytes for t in (*task.model.parameters(), *task.model.buffers())}
    return sum(nbytes for pointer, nbytes in tensors.items() if pointer not in frozen)


def _difference(first: Task, second: Task) -> str | None:
    """How what two tasks give to their backbones differs, tried out on two images; None where it
    is the same."""
    rng = np.random.default_rng(0)
    for height, width in PROBES:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        inputs = []
        for task in (first, second):
            with task.lock:
                inputs.append(task.inference.model_input(image))
        x, y = inputs
        if x.shape != y.shape:
            made = ' and '.join(f'{t.size(-1)}x{t.size(-2)}' for t in inputs)
            return (f'their preprocessing differs: of an image of {width}x{height} pixels they '
                    f'make {made} (scale, padding)')
        if not equal(x, y):
            if equal(x.flip(1).contiguous(), y.contiguous()):
                return 'their preprocessing differs in the order of channels (RGB and BGR)'
            scales = [_normalisation(task.model) for task in (first, second)]
            if scales[0] != scales[1]:
                return f'their preprocessing differs: {scales[0]} and {scales[1]}'
            return (f'their preprocessing differs: inputs of one shape are up to '
                    f'{float((x - y).abs().max()):.3g} apart (order of channels, interpolation, '
                    'crop, …)')
    return None


def _normalisation(model: nn.Module) -> str:
    told = []
    for name in ('mean', 'std'):
        values = getattr(model.data_preprocessor, name, None)
        told.append(f'no {name}' if values is None else
                    f'{name} {[round(value, 3) for value in values.flatten().tolist()]}')
    return ', '.join(told)
