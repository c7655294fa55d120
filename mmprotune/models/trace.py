"""A dry run of a backbone: what each of its modules returns, and what its outputs depend on."""
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

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

from .layout import Layout, describe

# Images of a dry run.
BATCH = 2


@dataclass
class _Call:
    """The one call of a module in the dry run.

    Attributes:
        order (int): When it ended.
        entry (Node, optional): Node of the graph that made its first argument.
        tensors (dict): What it returned, by output index. A tensor is not held, which on a large
            image takes gigabytes: its weak reference is the same object whoever returns it, and no
            other tensor's afterwards.
        nodes (dict): Nodes of the graph that made them.
        layouts (dict): How those are laid out that are features.
    """
    order: int
    entry: object
    tensors: dict[int | None, weakref.ref[Tensor]]
    nodes: dict[int | None, object]
    layouts: dict[int | None, Layout]


@dataclass
class Trace:
    """The calls of one dry run, by module path ('' is the backbone itself), and what the backbone
    returned, in a graph that holds no tensors. Modules that ran more than once are by themselves:
    no prompt stands behind them."""
    shape: tuple[int, int, int]
    batch: int
    calls: dict[str, _Call]
    repeated: set[str]
    outputs: list[Tensor] = field(repr=False)

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.shape[1:]

    def maps(self, path: str) -> dict[int | None, Layout]:
        """Layouts of the features that the module at ``path`` returned; by output index."""
        call = self.calls.get(path)
        return {} if call is None else call.layouts

    @cached_property
    def graph(self) -> Graph:
        """The graph behind the outputs."""
        return Graph(self.outputs)

    @cached_property
    def makers(self) -> dict[object, list[tuple[str, int | None]]]:
        """Paths and output indices of the features that each node of the graph made."""
        makers: dict[object, list[tuple[str, int | None]]] = {}
        for path, call in self.calls.items():
            for index in call.layouts:
                if path and call.nodes[index] is not None:
                    makers.setdefault(call.nodes[index], []).append((path, index))
        return makers


class Graph:
    """The autograd graph behind some tensors, from its ends to its beginnings.

    Args:
        outputs (list[Tensor]): The tensors.

    Attributes:
        position (dict): Of each node in an order in which inputs come before what is made of them.
        inputs (dict): The edges into each node, (node, output number); those from leaves, and from
            what was made of parameters alone, are left out.
    """

    def __init__(self, outputs: list[Tensor]) -> None:
        self.position: dict[object, int] = {}
        self.inputs: dict[object, list[tuple[object, int]]] = {}
        for tensor in outputs:
            if tensor.grad_fn is not None:
                self._visit(tensor.grad_fn)

    def _visit(self, root: object) -> None:
        stack = [(root, iter(self._edges(root)))] if root not in self.inputs else []
        while stack:
            node, edges = stack[-1]
            below = next((n for n, _ in edges if n not in self.inputs), None)
            if below is not None:
                stack.append((below, iter(self._edges(below))))
            else:
                self.position[node] = len(self.position)
                self.inputs[node] = [(n, i) for n, i in self.inputs[node]
                                     if self.inputs[n] or self._is_first(n)]
                stack.pop()

    @staticmethod
    def _is_first(node: object) -> bool:
        """Whether the image goes into it: a leaf that is no parameter."""
        return any(hasattr(n, 'variable') and not isinstance(n.variable, nn.Parameter)
                   for n, _ in node.next_functions)

    def _edges(self, node: object) -> list[tuple[object, int]]:
        edges = [(n, i) for n, i in node.next_functions
                 if n is not None and not hasattr(n, 'variable')]
        self.inputs[node] = edges
        return edges


def _tensors(output) -> dict[int | None, Tensor]:
    if isinstance(output, Tensor):
        return {None: output}
    if isinstance(output, (tuple, list)):
        return {i: t for i, t in enumerate(output) if isinstance(t, Tensor)}
    return {}


def with_item(output: tuple | list, item: Tensor, other: Tensor) -> tuple | list:
    """What a module returned, with another tensor wherever one stands: some backbones return one
    tensor twice, for the next stage and as the feature."""
    items = [other if one is item else one for one in output]
    # Named tuples take their items one by one.
    return output._make(items) if hasattr(output, '_make') else type(output)(items)


@contextlib.contextmanager
def _without_checkpointing(backbone: nn.Module) -> Iterator[None]:
    """While open, OpenMMLab's activation checkpointing is off, as it hides the graph."""
    switched = [m for m in backbone.modules() if getattr(m, 'with_cp', None) is True]
    for module in switched:
        module.with_cp = False
    try:
        yield
    finally:
        for module in switched:
            module.with_cp = True


def _run(backbone: nn.Module, shape: tuple[int, int, int]):
    """Runs the backbone on noise, in eval mode and in a graph that holds no tensors; the state of
    the random generator is as before."""
    with undisturbed(backbone), _without_checkpointing(backbone), torch.enable_grad(), \
            nothing_saved():
        # No leaf, which nobody may change in place.
        images = noise(backbone, shape, BATCH).requires_grad_().clone()
        torch.manual_seed(0)
        return backbone(images)


def _record(backbone: nn.Module, shape: tuple[int, int, int]) -> Trace:
    """Runs the backbone once and records what each module returned."""
    found: dict[str, _Call] = {}
    repeated: set[str] = set()
    entries: dict[str, list] = {}

    def enter(path):

        def note(module, args):
            tensor = next((a for a in args if isinstance(a, Tensor)), None)
            entries.setdefault(path, []).append(None if tensor is None else tensor.grad_fn)

        return note

    def leave(path):

        def record(module, args, output):
            if path in found:
                repeated.add(path)
            tensors = _tensors(output)
            maps = ((i, describe(t, shape[1:], BATCH)) for i, t in tensors.items())
            found[path] = _Call(
                len(found), entries[path].pop(), {i: weakref.ref(t) for i, t in tensors.items()},
                {i: t.grad_fn for i, t in tensors.items()},
                {i: layout for i, layout in maps if layout is not None})

        return record

    handles = [handle for path, module in backbone.named_modules()
               for handle in (module.register_forward_pre_hook(enter(path)),
                              module.register_forward_hook(leave(path)))]
    try:
        outputs = list(tensors_in(_run(backbone, shape)))
    finally:
        for handle in handles:
            handle.remove()
    calls = {path: call for path, call in found.items() if path not in repeated}
    features = {path for path in repeated if found[path].layouts}
    return Trace(shape, BATCH, calls, features, outputs)


def read_features(backbone: nn.Module, trace: Trace,
                  ends: Iterator[tuple[str, int | None]]) -> set[tuple[str, int | None]]:
    """Which features an output of the backbone depends on, as the graph behind the outputs shows.

    Where tokens belong to no pixel the graph does not tell, as a class token is cut out of the very
    tensor that holds the pixels. There another run with other pixels does.

    Args:
        backbone (nn.Module): The backbone.
        trace (Trace): Its dry run.
        ends (Iterator[tuple[str, int | None]]): Path and output index of each feature.

    Returns:
        set[tuple[str, int | None]]: Those of them that are read.
    """
    found = {(path, index) for path, index in ends
             if trace.calls[path].nodes[index] in trace.graph.position}
    # From the last one up: attention behind an earlier one mixes its tokens.
    for end in sorted(found, key=lambda end: trace.calls[end[0]].order, reverse=True):
        if not trace.maps(end[0])[end[1]].extra_tokens:
            break
        moved = _run_shifted(backbone, trace, *end)
        if any(not torch.equal(a, b) for a, b in zip(moved, trace.outputs)):
            break
        found.discard(end)
    return found


def _run_shifted(backbone: nn.Module, trace: Trace, path: str, index: int | None) -> list[Tensor]:
    """What the backbone returns with other values in the tokens of a feature that are pixels."""
    extra = trace.maps(path)[index].extra_tokens

    def shift(module, args, output):
        tensor = output if index is None else output[index]
        shifted = torch.cat((tensor[:, :extra], tensor[:, extra:].roll(1, dims=2)), 1)
        return shifted if index is None else with_item(output, tensor, shifted)

    handle = backbone.get_submodule(path).register_forward_hook(shift, prepend=True)
    try:
        return list(tensors_in(_run(backbone, trace.shape)))
    finally:
        handle.remove()


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
