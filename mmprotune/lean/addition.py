"""The sum of a feature and its prompt, from which the backward pass takes the feature again."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .base import stand_in
from .dropout import Draws, as_now
from .graph import FrozenLayerError, once_differentiable
from .precision import Precision, without_autocast

aten = torch.ops.aten


class Addition:
    r"""Computes :math:`\hat x = x + P(x)`.

    Keeps :math:`\hat x`, which the layers behind keep anyway, and the narrow tensor. The backward
    pass computes :math:`P(x)` again from the latter, and takes :math:`x = \hat x - P(x)`, which is
    exact up to the rounding of the sum, for the gradients of ``down``: those of a convolution where
    that is all of it, else by computing it again, too.

    Args:
        block, to_map, from_map, note: See :func:`~mmprotune.lean.prompts.add_prompt`.
    """

    def __init__(self, block: nn.Module, to_map: Callable[[Tensor], Tensor],
                 from_map: Callable[[Tensor], Tensor],
                 note: Callable[[Tensor, Tensor], None] | None) -> None:
        self.block, self.to_map, self.from_map, self.note = as_now(block), to_map, from_map, note
        first = block.lean.first
        self.conv = self.block.get_submodule(first) if first else None
        self.parameters = {n: p for n, p in block.named_parameters(remove_duplicate=False)
                           if not first or not n.startswith(f'{first}.')}

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x)[0]
        own = (None, None) if self.conv is None else (self.conv.weight, self.conv.bias)
        return _Add.apply(x, self, *own, *self.parameters.values())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prompted feature and the narrow tensor, without a graph."""
        feature = self.to_map(x)
        self._down_draws = Draws(self.block, feature)
        hidden = self.block.down(feature)
        self._up_draws = Draws(self.block, hidden)
        prompt = self.block.up(hidden)
        if self.note is not None:
            self.note(prompt, feature)
        return _combine(torch.add, x, self.from_map(prompt)), hidden

    def down(self, feature: Tensor, parameters: list[Tensor]) -> Tensor:
        """The narrow tensor once more, computed with other parameters."""
        with self._down_draws():
            return self._with(parameters).down(feature)

    def up(self, hidden: Tensor, parameters: list[Tensor]) -> Tensor:
        """The prompt once more, in the layout of the feature, likewise."""
        with self._up_draws():
            return self.from_map(self._with(parameters).up(hidden))

    def _with(self, parameters: list[Tensor]) -> nn.Module:
        return stand_in(self.block, dict(zip(self.parameters, parameters)))


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
        wants_x, _, _, _, *wants = ctx.needs_input_grad
        # Stand-ins: the parameters' own hooks run once, when autograd gets to the parameters, and
        # the values are those of the forward pass, whatever the block holds now.
        own = [p.detach().requires_grad_(wanted) for p, wanted in zip(parameters, wants)]
        trained = [p for p in own if p.requires_grad]
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), ctx.precision():
            # A view: PyTorch's counters of operations hook what modules read, and fail on a leaf.
            prompt = addition.up(hidden.view_as(hidden), own)
        inner, *found = torch.autograd.grad(
            prompt, (hidden, *trained), grad.to(prompt.dtype), allow_unused=True)
        weight_grad = bias_grad = None
        with without_autocast(grad):
            x = addition.to_map(_combine(torch.sub, y, prompt.detach()))
        if addition.conv is not None:
            with without_autocast(grad):
                outer, weight_grad, bias_grad = _convolution_backward(
                    addition.conv, inner, x, weight, ctx.needs_input_grad)
        else:
            x = x.detach().requires_grad_()
            with torch.enable_grad(), ctx.precision():
                again = addition.down(x.view_as(x), own)
            outer, *more = torch.autograd.grad(again, (x, *trained), inner, allow_unused=True)
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, more)]
        if wants_x:
            with without_autocast(grad):
                outer = addition.from_map(outer).to(ctx.dtype) + grad.to(ctx.dtype)
        found = iter(found)
        return (outer if wants_x else None, None, weight_grad, bias_grad,
                *(next(found) if wanted else None for wanted in wants))


def _convolution_backward(conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor,
                          wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of a convolution's input, weight and bias, those of the parameters in their dtype.

    Args:
        conv (nn.Conv2d): The convolution.
        grad (Tensor): Gradient of its output.
        x (Tensor): Its input.
        weight (Tensor): Its weight, as it was.
        wants (tuple[bool, ...]): Of input, anything, weight and bias.
    """
    wants_x, _, *wants_own = wants[:4]
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    outer, *own = aten.convolution_backward(
        grad, x.to(grad.dtype), weight.to(grad.dtype), [weight.size(0)], conv.stride, padding,
        conv.dilation, False, [0, 0], conv.groups, [wants_x, *wants_own])
    return outer, *(g.to(weight.dtype) if wanted else None for g, wanted in zip(own, wants_own))
