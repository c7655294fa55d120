"""What ``torch.compile`` records in place of the operators that would keep too much.

The compiler decides itself what the backward pass keeps and what it computes again
(:mod:`torch._functorch.partitioners`), from the operators of both passes. Norms, activations and masks
are left to it. What it can not know is that the backward operator of a convolution, asked for the
gradient of the input alone, never reads the input.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .precision import without_autocast

aten = torch.ops.aten


class _Convolve(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, conv):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.conv = x.shape, x.dtype, conv
        return conv.convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        conv = ctx.conv
        with without_autocast(grad):
            # A stand-in, of which no more than shape and layout are read.
            x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device)
            grad = aten.convolution_backward(
                grad, x, weight.to(grad.dtype), None, conv.stride, conv.padding, conv.dilation,
                conv.transposed, conv.output_padding, conv.groups, [True, False, False])[0]
        return grad.to(ctx.dtype), None, None, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, conv) -> Tensor:
    """A convolution with a frozen weight. Keeps nothing.

    Args:
        x (Tensor): Input, padded already where ``conv.pad`` says.
        weight (Tensor): Weight.
        bias (Tensor, optional): Bias.
        conv (Convolution): Settings.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Convolve.apply(x, weight, bias, conv)
    return conv.convolve(x, weight, bias)
