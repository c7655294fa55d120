"""A dry run of a backbone: what each of its modules returns, and what its outputs depend on."""
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmprotune.errors import StageError
from mmprotune.lean.dry_run import (
    image_shapes,
    noise,
    nothing_saved,
    tensors_in,
    undisturbed,
)

from . import calls
from .layout import Layout, describe

# Images of a dry run.
BATCH = 2


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
def _dry(backbone: nn.Module, shape: tuple[int, int, int], hook: Callable[[str], Callable],
         batch: int = BATCH):
    """Eval mode and a forward hook on every submodule; yields a function that runs the backbone on
    noise. Everything is as before afterwards, the state of the random generator included."""
    handles = [
        module.register_forward_hook(hook(path)) for path, module in backbone.named_modules()
        if path
    ]
    images = noise(backbone, shape, batch)
    try:
        with undisturbed(backbone):
            def run():
                torch.manual_seed(0)
                return backbone(images)

            yield run
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
            found = ((i, describe(t, shape[1:], BATCH)) for i, t in tensors.items())
            calls[path] = _Call(
                len(calls), {i: weakref.ref(t) for i, t in tensors.items()},
                {i: layout for i, layout in found if layout is not None})

        return record

    with _dry(backbone, shape, hook) as run, torch.no_grad():
        outputs = list(tensors_in(run()))
    for path in repeated:  # a module that runs twice ends no stage
        del calls[path]
    return Trace(shape, BATCH, calls, outputs)


def read_features(backbone: nn.Module, trace: Trace,
                  ends: Iterable[str]) -> set[tuple[str, int | None]]:
    """Which of the features at the stage ends an output of the backbone depends on: a zero that
    requires a gradient is added to each, and looked for in the graph behind the outputs.

    Where tokens belong to no pixel the graph does not tell, as a class token is cut out of the very
    tensor that holds the pixels. There another run with other pixels does.

    Args:
        backbone (nn.Module): The backbone.
        trace (Trace): Its dry run.
        ends (Iterable[str]): Paths of the modules that end stages.

    Returns:
        set[tuple[str, int | None]]: Path and output index of those features.
    """
    ends = set(ends)
    outputs, zeros = _run_marked(backbone, trace, ends)
    nodes = [t.grad_fn for t in outputs if t.grad_fn is not None]
    found, seen = set(), set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, 'variable', None)
        found.update(end for end, zero in zeros if zero is leaf)
        nodes += [n for n, _ in node.next_functions if n is not None]
    # From the last one up: attention behind an earlier one mixes its tokens.
    for end in sorted(found, key=lambda end: trace.calls[end[0]].order, reverse=True):
        layout = trace.maps(end[0]).get(end[1])
        if layout is None or not layout.extra_tokens:
            break
        moved, _ = _run_marked(backbone, trace, ends, end)
        if any(not torch.equal(a, b) for a, b in zip(moved, outputs)):
            break
        found.discard(end)
    return found


def _run_marked(backbone: nn.Module, trace: Trace, ends: set[str],
                shifted: tuple[str, int | None] | None = None) -> tuple[list[Tensor], list]:
    """Runs the backbone with a zero that requires a gradient added to each feature at the ends;
    other values in the tokens of one feature that are pixels, where ``shifted`` names it.

    Returns:
        tuple[list[Tensor], list]: The outputs, and pairs of a feature's path and index and its
        zero.
    """
    zeros: list[tuple[tuple[str, int | None], Tensor]] = []

    def hook(path):

        def add(module, args, output):
            if path not in ends:
                return None

            def marked(index: int | None, tensor: Tensor) -> Tensor:
                zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device, requires_grad=True)
                zeros.append(((path, index), zero))
                if (path, index) == shifted:
                    extra = trace.maps(path)[index].extra_tokens
                    tensor = torch.cat((tensor[:, :extra], tensor[:, extra:].roll(1, dims=2)), 1)
                return tensor + zero

            if isinstance(output, Tensor):
                return marked(None, output)
            new = {id(output[i]): marked(i, output[i]) for i in trace.maps(path)}
            return type(output)(new.get(id(item), item) for item in output)

        return add

    # On one image, as that is enough; always in a graph, so that the same kernels run.
    with _dry(backbone, trace.shape, hook, 1) as run, torch.enable_grad(), nothing_saved():
        return list(tensors_in(run())), zeros


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


def returns_more_in_training(owner: nn.Module) -> bool:
    """Whether a backbone itself, not a layer of it, returns other outputs in training.

    Args:
        owner (nn.Module): The prompted backbone around it.
    """
    backbone = owner.backbone
    forward = getattr(type(backbone).forward, '__code__', None)
    if 'training' not in getattr(forward, 'co_names', ()):
        return False
    counts = {}
    for mode in (False, True):
        with undisturbed(owner), torch.no_grad():
            backbone.training = mode
            for shape in image_shapes(backbone):
                with contextlib.suppress(Exception), \
                        calls.opened(owner, calls.Call(shape[1:], plain=True)):
                    outputs = backbone(noise(backbone, shape, BATCH))
                    counts[mode] = len(list(tensors_in(outputs)))
                    break
    return len(set(counts.values())) == 2
