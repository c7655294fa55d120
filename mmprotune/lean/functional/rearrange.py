"""Rearrangements of a tensor, of which a norm that follows saves the tensor itself."""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ..graph import Kept, Origin, builds_graph


def rearranged(x: Tensor, result: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Notes that ``result`` is a rearrangement of ``x``, for a norm that follows to keep ``x``.

    Args:
        x (Tensor): What was rearranged.
        result (Tensor): ``compute(x)``.
        compute (Callable): The rearrangement.

    Returns:
        Tensor: ``result``.
    """
    if builds_graph(x):
        kept = Kept(x)
        Origin(kept.take(), result, lambda source: compute(kept(source)))
    return result


def unfold(x: Tensor, kernel_size, dilation=1, padding=0, stride=1) -> Tensor:
    """``F.unfold``. Keeps nothing; a LayerNorm that follows keeps ``x`` and not its patches."""
    settings = kernel_size, dilation, padding, stride
    return rearranged(x, F.unfold(x, *settings), lambda x: F.unfold(x, *settings))
