"""What belongs to one call of a prompted backbone: nothing of it lives on the module, so that calls
in several threads, or several before one backward pass, do not see each other's."""
from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .layout import token_grid

if TYPE_CHECKING:
    from .insertion import Stage


class Call:
    """One call of a prompted backbone.

    Attributes:
        image (tuple[int, int], optional): Height and width of the images; None while calls of this
            thread are only set up (notes, prompts or not).
        plain (bool): Whether the backbone runs without its prompts.
        note (Callable, optional): Called with the name of each stage, its prompt and its feature,
            both (N, C, H, W).
    """
    __slots__ = ('__weakref__', 'image', 'note', 'plain')

    def __init__(self, image: tuple[int, int] | None, plain: bool = False,
                 note: Callable[[str, Tensor, Tensor], None] | None = None) -> None:
        self.image, self.plain, self.note = image, plain, note


_thread = threading.local()
# Calls whose graph is alive: a backward pass may run their layers again.
_in_graphs: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Call]] = \
    weakref.WeakKeyDictionary()


def current(owner: nn.Module) -> Call | None:
    """The innermost open call of a module on this thread."""
    # torch.export runs a module through stand-ins, other objects with its very attributes. The
    # module itself comes first: compilers of older PyTorch do not read `__dict__`.
    return next((call for of, call in reversed(getattr(_thread, 'calls', ()))
                 if of is owner or of.__dict__ is owner.__dict__), None)


@contextlib.contextmanager
def opened(owner: nn.Module, call: Call) -> Iterator[Call]:
    """While open, ``call`` is the current one of ``owner`` on this thread."""
    if not hasattr(_thread, 'calls'):
        _thread.calls = []
    _thread.calls.append((owner, call))
    try:
        yield call
    finally:
        _thread.calls.pop()


def keep_with_graph(owner: nn.Module, call: Call, outputs: Iterator[Tensor]) -> None:
    """Remembers a call for as long as the graph behind its outputs lives."""
    nodes = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    for node in nodes:
        node.metadata.setdefault(__name__, []).append(call)
    if nodes:
        _in_graphs.setdefault(owner, weakref.WeakSet()).add(call)


def images(owner: nn.Module) -> list[tuple[int, int]]:
    """Sizes (H, W) of the images that a module's layers may be running on now: those of the call;
    while a backward pass runs layers again, those of every call whose graph is alive."""
    call = current(owner)
    if call is not None and call.image is not None:
        return [call.image]
    return sorted({c.image for c in _in_graphs.get(owner, ()) if c.image is not None})


def is_plain(owner: nn.Module) -> bool:
    """Whether a module's layers run without prompts now: as the current call says; while a backward
    pass runs layers again, as those calls do whose graph is alive.

    Raises:
        ValueError: Some of those have prompts and some have not.
    """
    call = current(owner)
    if call is not None:
        return call.plain
    kinds = {c.plain for c in _in_graphs.get(owner, ())} if _is_backward() else set()
    if len(kinds) == 2:
        raise ValueError(
            f'{type(owner.backbone).__name__}: layers are run again for the backward pass while '
            'graphs with prompts and without are alive; switch activation checkpointing off '
            '(backbone.with_cp=False), or call backward before the next forward')
    return kinds == {True}


def _is_backward() -> bool:
    """Whether autograd runs a backward pass on this thread. Elsewhere somebody calls a layer by
    itself."""
    task = getattr(torch._C, '_current_graph_task_id', None)  # there is no public name
    return task is not None and task() != -1


def grid_of(owner: nn.Module, stage: Stage, x: Tensor) -> tuple[int, int]:
    """Height and width of the grid behind the tokens of a stage.

    Args:
        owner (nn.Module): The prompted backbone.
        stage (Stage): The stage.
        x (Tensor): Its feature, (N, L, C).

    Raises:
        ValueError: The tokens fit no grid, or several.
    """
    extra, stride = stage.layout.extra_tokens, stage.layout.stride
    sizes = images(owner)
    grids = {token_grid(x.size(1), image, stride, extra) for image in sizes} - {None}
    if len(grids) == 1:
        return grids.pop()
    where = f'{type(owner.backbone).__name__}.{stage.path}'
    if grids:
        raise ValueError(
            f'{where}: {x.size(1)} tokens may be a grid of any of {sorted(grids)}: layers are '
            'run again for the backward pass while graphs of images of several sizes are alive;'
            ' switch activation checkpointing off (backbone.with_cp=False), or call backward '
            'before the next forward')
    raise ValueError(
        f'{where}: {x.size(1)} tokens with {extra} extra ones fit no grid of stride '
        f'{stride:g} on images of {sizes or "unknown size"}; the feature has shape '
        f'{tuple(x.shape)}')
