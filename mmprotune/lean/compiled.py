"""What ``torch.compile`` records in place of operators that would keep too much.

The compiler chooses itself what the backward pass keeps and what it computes again, so norms,
activations and their masks are left to it. It cannot know that the backward operator of a
convolution, asked for the gradient of the input alone, never reads the input that it is given.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .precision import cast, converted, without_autocast

aten = torch.ops.aten


class _Convolve(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, conv, memory_format, scale):
        ctx.save_for_backward(weight, scale)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.conv, ctx.memory_format = conv, memory_format
        return conv.convolve(x, cast(weight, x, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        conv = ctx.conv
        with without_autocast(grad):
            # A stand-in, of which no more than shape and layout are read.
            x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device,
                            memory_format=ctx.memory_format)
            grad = aten.convolution_backward(
                grad, x, converted(weight, grad.dtype, scale), None, conv.stride, conv.padding,
                conv.dilation, conv.transposed, conv.output_padding, conv.groups,
                [True, False, False])[0]
        return grad.to(ctx.dtype), None, None, None, None, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Any,
                memory_format: torch.memory_format, scale: Tensor | None) -> Tensor:
    """A convolution with a frozen weight, as the compiler is to record it. Keeps nothing.

    Args:
        x (Tensor): Input, padded already where ``conv.pad`` says.
        weight (Tensor): Weight.
        bias (Tensor, optional): Bias.
        conv (mmprotune.lean.functional.Convolution): Settings.
        memory_format (torch.memory_format): How ``x`` lies in memory.
        scale (Tensor, optional): Of a weight in 8 bits.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Convolve.apply(x, weight, bias, conv, memory_format, scale)
    return conv.convolve(x, cast(weight, x, scale), bias)
