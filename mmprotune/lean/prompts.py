"""Adds a prompt to a feature map so that the backward pass needs the sum, not the feature map.

The sum is what the next layers and the neck keep anyway; the map that the prompt was computed from
is the sum less the prompt.
"""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .graph import FrozenLayerError, Precision, without_autocast

aten = torch.ops.aten


class _Watch(threading.local):
    """What this thread's dry run notes: prompted features, each with its version."""
    added: list[tuple[Tensor, int]] | None = None


_watch = _Watch()


@contextlib.contextmanager
def watch_additions() -> Iterator[list[tuple[Tensor, int]]]:
    """While open, notes each prompted feature that this thread computes, in a graph or without one,
    and its version then, in the list that it yields."""
    before, _watch.added = _watch.added, []
    try:
        yield _watch.added
    finally:
        _watch.added = before


class PromptAddition:
    r"""Computes :math:`\hat x = x + P(x)` where :math:`P` starts with a 1x1 convolution.

    Keeps :math:`\hat x` and the narrow output of that convolution. The backward pass computes
    :math:`P(x)` again from the latter, and takes :math:`x = \hat x - P(x)`, which is exact up to
    the rounding of the sum, for the gradient of the convolution's weight.

    Args:
        first (Callable): The 1x1 convolution, from (N, C, H, W) to (N, hidden, H, W).
        weight, bias (Tensor): Its parameters.
        rest (Callable): What follows it, to the prompt, (N, C, H, W). Takes the narrow tensor and,
            to compute with them instead of its parameters, as many tensors.
        parameters (Sequence[Tensor]): The parameters of ``rest``.
        to_map (Callable): From the feature as its stage returns it to (N, C, H, W).
        from_map (Callable): The way back. Both are linear and move elements only.
        note (Callable, optional): Called with prompt and feature map of each forward pass.
            Defaults to None.
    """

    def __init__(self,
                 first: Callable[[Tensor], Tensor],
                 weight: Tensor,
                 bias: Tensor,
                 rest: Callable[..., Tensor],
                 parameters: Sequence[Tensor],
                 to_map: Callable[[Tensor], Tensor],
                 from_map: Callable[[Tensor], Tensor],
                 note: Callable[[Tensor, Tensor], None] | None = None) -> None:
        self.first, self.weight, self.bias = first, weight, bias
        self.rest, self.parameters = rest, parameters
        self.to_map, self.from_map, self.note = to_map, from_map, note

    def __call__(self, x: Tensor) -> Tensor:
        """Adds the prompt.

        Args:
            x (Tensor): The feature, as its stage returns it.

        Returns:
            Tensor: The prompted feature, likewise.
        """
        if torch.is_grad_enabled():
            y = _Add.apply(x, self, self.weight, self.bias, *self.parameters)
        else:
            y = self.forward(x)[0]
        if _watch.added is not None:
            _watch.added.append((y, y._version))
        return y

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prompted feature and the narrow tensor, without a graph."""
        feature = self.to_map(x)
        hidden = self.first(feature)
        prompt = self.rest(hidden)
        if self.note is not None:
            self.note(prompt, feature)
        return _combine(torch.add, x, self.from_map(prompt)), hidden


def _combine(function: Callable, x: Tensor, prompt: Tensor) -> Tensor:
    """``function(x, prompt)``, in the memory of the prompt where the result fits there."""
    fits = (prompt.dtype == x.dtype and prompt.stride() == x.stride() and not prompt._is_view())
    return function(x, prompt, out=prompt) if fits else function(x, prompt)


class _Add(Function):

    @staticmethod
    def forward(ctx, x, addition, weight, bias, *parameters):
        y, hidden = addition.forward(x)
        ctx.addition, ctx.precision, ctx.dtype = addition, Precision(x.device), x.dtype
        ctx.save_for_backward(y, hidden, weight, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        try:
            y, hidden, weight, *parameters = ctx.saved_tensors
        except RuntimeError as error:
            if 'modified by an inplace operation' not in str(error):
                raise
            raise FrozenLayerError(
                'a prompted feature, or a parameter of its prompt block, was changed in place '
                'between the forward and the backward pass; if some layer does so on purpose, set '
                "model.backbone.lean=dict(prompts='bottleneck'), which keeps the feature from "
                f'before the prompt was added ({error})') from error
        addition = ctx.addition
        wants_x, _, wants_weight, wants_bias, *wants = ctx.needs_input_grad
        # Stand-ins: the parameters' own hooks run once, when autograd gets to the parameters, and
        # the values are those of the forward pass, whatever the block holds now.
        own = [p.detach().requires_grad_(wanted) for p, wanted in zip(parameters, wants)]
        trained = [p for p in own if p.requires_grad]
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), ctx.precision():
            # A view: PyTorch's counters of operations hook what modules read, and fail on a leaf.
            prompt = addition.from_map(addition.rest(hidden.view_as(hidden), own))
        inner, *found = torch.autograd.grad(
            prompt, (hidden, *trained), grad.to(prompt.dtype), allow_unused=True)
        found = iter(found)
        gradients = [next(found) if wanted else None for wanted in wants]
        with without_autocast(grad):
            x = addition.to_map(_combine(torch.sub, y, prompt.detach())).to(inner.dtype)
            outer, weight_grad, bias_grad = aten.convolution_backward(
                inner, x, weight.to(inner.dtype), [weight.size(0)], [1, 1], [0, 0], [1, 1], False,
                [0, 0], 1, [wants_x, wants_weight, wants_bias])
            if wants_x:
                outer = addition.from_map(outer).to(ctx.dtype) + grad.to(ctx.dtype)
            if wants_weight:
                weight_grad = weight_grad.to(weight.dtype)
            if wants_bias:
                bias_grad = bias_grad.to(weight.dtype)
        return outer, None, weight_grad, bias_grad, *gradients
