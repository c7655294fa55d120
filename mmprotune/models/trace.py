"""A dry run of a backbone: what each of its modules returns, and what its outputs depend on."""
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmprotune.errors import StageError
from mmprotune.frozen.dry_run import (
    image_shapes,
    noise,
    nothing_saved,
    tensors_in,
    undisturbed,
)

from .layout import Layout, describe

_BATCH = 2


@dataclass
class _Call:
    """The one call of a module in the dry run: when it ended, which tensors it returned and how
    they are laid out. A tensor is not held, which on a large image takes gigabytes: its weak
    reference is the same object whoever returns it, and no other tensor's afterwards."""
    order: int
    tensors: dict[int | None, weakref.ref[Tensor]]
    layouts: dict[int | None, Layout]


@dataclass
class Trace:
    """The calls of one dry run, by module path, and what the backbone returned."""
    shape: tuple[int, int, int]
    batch: int
    calls: dict[str, _Call]
    outputs: list[Tensor]

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.shape[1:]

    def maps(self, path: str) -> dict[int | None, Layout]:
        """Layouts of the features that the module at ``path`` returned; by output index."""
        call = self.calls.get(path)
        return {} if call is None else call.layouts


def _tensors(output) -> dict[int | None, Tensor]:
    if isinstance(output, Tensor):
        return {None: output}
    if isinstance(output, (tuple, list)):
        return {i: t for i, t in enumerate(output) if isinstance(t, Tensor)}
    return {}


@contextlib.contextmanager
def _dry(backbone: nn.Module, shape: tuple[int, int, int], hook: Callable[[str], Callable]):
    """Eval mode and a forward hook on every submodule; yields a function that runs the backbone on
    noise. Everything is as before afterwards, the state of the random generator included."""
    handles = [
        module.register_forward_hook(hook(path)) for path, module in backbone.named_modules()
        if path
    ]
    images = noise(backbone, shape, _BATCH)
    try:
        with undisturbed(backbone):
            yield lambda: backbone(images)
    finally:
        for handle in handles:
            handle.remove()


def _record(backbone: nn.Module, shape: tuple[int, int, int]) -> Trace:
    """Runs the backbone once and records what each module returned."""
    calls: dict[str, _Call] = {}
    repeated: set[str] = set()

    def hook(path):

        def record(module, args, output):
            if path in calls:
                repeated.add(path)
            tensors = _tensors(output)
            found = ((i, describe(t, shape[1:], _BATCH)) for i, t in tensors.items())
            calls[path] = _Call(
                len(calls), {i: weakref.ref(t) for i, t in tensors.items()},
                {i: layout for i, layout in found if layout is not None})

        return record

    with _dry(backbone, shape, hook) as run, torch.no_grad():
        outputs = list(tensors_in(run()))
    for path in repeated:  # a module that runs twice ends no stage
        del calls[path]
    return Trace(shape, _BATCH, calls, outputs)


def read_features(backbone: nn.Module, trace: Trace,
                  ends: Iterable[str]) -> set[tuple[str, int | None]]:
    """Which of the features at the stage ends an output of the backbone depends on: a zero that
    requires a gradient is added to each, and looked for in the graph behind the outputs.

    Where tokens belong to no pixel the graph does not tell, as a class token is cut out of the very
    tensor that holds the pixels. There another run with other pixels does.
    """
    ends = set(ends)
    zeros: dict[int, tuple[str, int | None]] = {}
    keep_alive: list = []

    def hook(path):

        def add(module, args, output):
            if path not in ends:
                return None

            def marked(index, tensor):
                zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device, requires_grad=True)
                zeros[id(zero)] = (path, index)
                keep_alive.append(zero)
                return tensor + zero

            if isinstance(output, Tensor):
                return marked(None, output)
            maps = trace.maps(path)
            new = {id(output[i]): marked(i, output[i]) for i in maps}
            return type(output)(new.get(id(item), item) for item in output)

        return add

    with _dry(backbone, trace.shape, hook) as run, torch.enable_grad(), nothing_saved():
        nodes = [t.grad_fn for t in tensors_in(run()) if t.grad_fn is not None]
    found, seen = set(), set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, 'variable', None)
        if leaf is not None and id(leaf) in zeros:
            found.add(zeros[id(leaf)])
        nodes += [n for n, _ in node.next_functions if n is not None]
    # From the last one up: attention behind an earlier one mixes its tokens.
    order = sorted(found, key=lambda end: trace.calls[end[0]].order, reverse=True)
    for path, index in order:
        extra = trace.maps(path)[index].extra_tokens if index in trace.maps(path) else 0
        if not extra or _depends_on_pixels(backbone, trace, path, index, extra):
            break
        found.discard((path, index))
    return found


def _depends_on_pixels(backbone: nn.Module, trace: Trace, path: str, index: int | None,
                       extra: int) -> bool:
    """Whether other values of the tokens behind the first ``extra`` ones give other outputs."""

    def hook(at):

        def shift(module, args, output):
            if at != path:
                return None
            plain = output if index is None else output[index]
            moved = torch.cat((plain[:, :extra], plain[:, extra:].roll(1, dims=2)), dim=1)
            if index is None:
                return moved
            return type(output)(moved if item is plain else item for item in output)

        return shift

    with _dry(backbone, trace.shape, hook) as run, torch.no_grad():
        return any(not torch.equal(a, b) for a, b in zip(tensors_in(run()), trace.outputs))


def dry_run(backbone: nn.Module) -> Trace:
    """Runs the backbone on the first image size that it accepts.

    Args:
        backbone (nn.Module): Takes images of shape (N, 3, H, W), or (N, 1, H, W).

    Raises:
        StageError: No size runs; says the last error.
    """
    shapes = image_shapes(backbone)
    error: Exception | None = None
    for shape in shapes:
        try:
            return _record(backbone, shape)
        except Exception as e:  # any failure means: not at this size
            error = e if shape[0] == shapes[0][0] else error
    sizes = ', '.join(dict.fromkeys(f'{h}x{w}' for _, h, w in shapes))
    raise StageError(
        f'backbone: {type(backbone).__name__} ran at none of the image sizes {sizes}; the last '
        f'error: {type(error).__name__}: {error}')
