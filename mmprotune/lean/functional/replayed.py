"""The host's own operators between frozen layers, computed again in the backward pass."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from ..graph import Needed, Unchanged, builds_graph, once_differentiable, unviewed
from ..precision import Precision, without_autocast
from .attention import parts


class _Host:
    """What the host computes, and its gradient by autograd, by running it once more.

    Args:
        compute (Callable): See :func:`replayed`.
        mix (Callable, optional): See :func:`replayed`.
        weights (Iterable[Tensor]): See :func:`replayed`.
    """

    def __init__(self, compute: Callable[..., Tensor | Sequence[Tensor]],
                 mix: Callable[..., Tensor] | None,
                 weights: Iterable[Tensor] = ()) -> None:
        self.compute, self.mix, self.weights = compute, mix, Unchanged(weights)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.mix is None:
            return self.compute(*tensors)
        heads = self.compute(*tensors)
        mixed = [(part, self.mix(*(t[part] for t in heads))) for part in parts(*heads[:2])]
        if len(mixed) == 1:
            return mixed[0][1]
        out = mixed[0][1].new_empty(*heads[0].shape[:3], mixed[0][1].size(-1))
        for part, y in mixed:
            out[part] = y
        return out

    def backward(self, grad: Tensor, values: Sequence[Tensor], extras: Sequence[Tensor],
                 precision: Precision) -> Sequence[Tensor]:
        self.weights.check()
        leaves = [value.detach().requires_grad_() for value in values]
        with torch.enable_grad(), precision():
            result = self.compute(*leaves, *extras)
        if self.mix is None:
            return torch.autograd.grad(result, leaves, grad)
        gradients = [torch.empty_like(t) for t in result]
        for part in parts(*result[:2]):
            with torch.enable_grad(), precision():
                own = [t[part].detach().requires_grad_() for t in result]
                mixed = self.mix(*own)
            for target, value in zip(gradients, torch.autograd.grad(mixed, own, grad[part])):
                target[part] = value
        return torch.autograd.grad(result, leaves, gradients)


class _Replayed(Function):

    @staticmethod
    def forward(ctx, host, needed, extras, *tensors):
        values = tensors[len(needed):]
        ctx.host, ctx.needed, ctx.precision = host, needed, Precision(values[0].device)
        ctx.save_for_backward(*extras, *(n.take() for n in needed))
        return unviewed(host.forward([*values, *extras]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        count = len(ctx.needed)
        tensors = ctx.saved_tensors  # activation checkpointing hands them out once
        extras, saved = tensors[:-count], tensors[-count:]
        values = [n.value(tensor) for n, tensor in zip(ctx.needed, saved)]
        gradients = ctx.host.backward(grad, values, extras, ctx.precision)
        with without_autocast(grad):
            gradients = [n.gradient(g) for n, g in zip(ctx.needed, gradients)]
        return None, None, None, *gradients, *[None] * count


def replayed(compute: Callable[..., Tensor | Sequence[Tensor]],
             *inputs: Tensor,
             extras: Sequence[Tensor] = (),
             weights: Iterable[Tensor] = (),
             mix: Callable[..., Tensor] | None = None) -> Tensor:
    """What a host computes with nothing in it that trains.

    Keeps the inputs and the extras, nothing that is computed from them. Where the frozen layer that
    made an input has an owner (see :func:`~mmprotune.lean.functional.convolution`): its input
    instead; nothing where that is the output of a frozen LayerNorm.

    Args:
        compute (Callable): Takes the inputs and the extras, and is run again in the backward pass.
            Draws nothing, changes nothing in place.
        *inputs (Tensor): What gets a gradient.
        extras (Sequence[Tensor]): What gets none. Defaults to ().
        weights (Iterable[Tensor]): Frozen tensors that ``compute`` has by itself, which nobody may
            change before the backward pass. Defaults to ().
        mix (Callable, optional): What comes behind, of attention whose probabilities would take
            much memory: ``compute`` then returns several tensors of shape (B, heads, tokens, …),
            queries and keys first, and ``mix`` takes as many, of a part of the batch and the heads,
            and returns one of shape (…, …, tokens, channels). Defaults to None.

    Returns:
        Tensor: What ``compute`` returned, or ``mix``.
    """
    if not builds_graph(*inputs):
        return _Host(compute, mix).forward([*inputs, *extras])
    host = _Host(compute, mix, weights)
    needed = [Needed(t) for t in inputs]
    return _Replayed.apply(host, needed, tuple(extras), *(n.pop() for n in needed),
                           *(t.detach() for t in inputs))
