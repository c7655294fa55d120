"""Convolutions with frozen weights."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import compiled
from ..graph import (
    LeanState,
    Producer,
    builds_graph,
    check_frozen,
    is_compiled,
    once_differentiable,
)
from ..precision import cast, converted, without_autocast

aten = torch.ops.aten

_CONVOLUTIONS = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}


class Convolution:
    """The settings of a convolution over 1 to 3 dimensions, transposed or not.

    Args:
        stride, padding, dilation (Sequence[int]): One number a dimension.
        groups (int): Groups of channels.
        transposed (bool): Whether it is a transposed convolution. Defaults to False.
        output_padding (Sequence[int], optional): Of a transposed one. Defaults to zeros.
        pad (Sequence[int], optional): Padding applied before, as ``F.pad`` takes it. Defaults to
            None.
        pad_mode (str): Its mode. Defaults to 'constant'.
    """

    def __init__(self,
                 stride: Sequence[int],
                 padding: Sequence[int],
                 dilation: Sequence[int],
                 groups: int,
                 transposed: bool = False,
                 output_padding: Sequence[int] | None = None,
                 pad: Sequence[int] | None = None,
                 pad_mode: str = 'constant') -> None:
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        self.transposed = transposed
        self.output_padding = list(output_padding or [0] * len(self.stride))
        self.pad = list(pad) if pad is not None and any(pad) else None
        self.pad_mode = pad_mode

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None,
              scale: Tensor | None = None) -> Tensor:
        """Applies the convolution."""
        bias = cast(bias, x)
        if self.pad is not None:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        if is_compiled():
            return compiled.convolution(x, weight, bias, self, memory_format_of(x), scale)
        return self.convolve(x, cast(weight, x, scale), bias)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies the convolution to an input that is padded already."""
        # By the functions that autocast knows, on every device.
        plain, transposed = _CONVOLUTIONS[len(self.stride)]
        if self.transposed:
            return transposed(x, weight, bias, self.stride, self.padding, self.output_padding,
                              self.groups, self.dilation)
        return plain(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self,
                       grad: Tensor,
                       weight: Tensor,
                       shape: Sequence[int],
                       memory_format: torch.memory_format,
                       scale: Tensor | None = None) -> Tensor:
        """The gradient of an input of the given shape and memory format."""
        weight = converted(weight, grad.dtype, scale)
        points = self._subsampled(weight, shape)
        if points is not None:
            gradient = grad.new_zeros(shape).contiguous(memory_format=memory_format)
            target = gradient[points]
            target.copy_(self._pointwise().input_gradient(
                grad, weight, target.shape, memory_format))
            return gradient
        # On one thread PyTorch would take a detour through patches.
        if (self._is_matrix(grad, weight, memory_format) and torch.get_num_threads() == 1
                and grad.is_contiguous()):
            matrix = weight.flatten(1).t()
            return torch.matmul(matrix, grad.flatten(2)).view(shape)
        # PyTorch's backward asks for the input, but reads no more of it than shape and layout.
        x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        padded = x if self.pad is None else F.pad(x, self.pad)
        grad = aten.convolution_backward(
            grad, padded, weight, None, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups, [True, False, False])[0]
        if self.pad is None:
            return grad
        with torch.enable_grad():  # padding is linear, so its gradient is the same at zero
            x = x.zero_().requires_grad_()
            return torch.autograd.grad(F.pad(x, self.pad, mode=self.pad_mode), x, grad)[0]

    def _is_pointwise(self, weight: Tensor) -> bool:
        """Whether each output pixel sees one input pixel."""
        return (math.prod(weight.shape[2:]) == 1 and not any(self.padding) and self.pad is None
                and not self.transposed)

    def _pointwise(self) -> Convolution:
        """This convolution on the pixels that it sees."""
        ones = [1] * len(self.stride)
        return Convolution(ones, self.padding, ones, self.groups)

    def _subsampled(self, weight: Tensor, shape: Sequence[int]) -> tuple[slice, ...] | None:
        """The pixels that a pointwise convolution with a stride sees; None for any other."""
        if not self._is_pointwise(weight) or math.prod(self.stride) == 1:
            return None
        return (slice(None), slice(None), *(slice(None, None, s) for s in self.stride))

    def _is_matrix(self, x: Tensor, weight: Tensor,
                   memory_format: torch.memory_format) -> bool:
        """Whether this is one matrix for all pixels of a map on a CPU."""
        return (x.device.type == 'cpu' and self._is_pointwise(weight)
                and math.prod(self.stride) == 1 and self.groups == 1 and x.numel() > 0
                and x.is_contiguous(memory_format=memory_format))


def memory_format_of(x: Tensor) -> torch.memory_format:
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(
                memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


class _Convolve(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, conv, scale):
        ctx.save_for_backward(weight, scale)
        ctx.conv, ctx.dtype = conv, x.dtype
        ctx.shape, ctx.memory_format = x.shape, memory_format_of(x)
        return conv.apply(x, weight, bias, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        with without_autocast(grad):
            grad = ctx.conv.input_gradient(grad, weight, ctx.shape, ctx.memory_format, scale)
        return grad.to(ctx.dtype), None, None, None, None


def convolution(x: Tensor,
                weight: Tensor,
                bias: Tensor | None,
                conv: Convolution,
                owner: LeanState | None = None,
                scale: Tensor | None = None) -> Tensor:
    r"""A convolution with a frozen weight.

    Keeps nothing.

    Args:
        x (Tensor): Input of shape (N, C, \*) or (C, \*).
        weight (Tensor): Weight.
        bias (Tensor, optional): Bias.
        conv (Convolution): Settings.
        owner (LeanState, optional): The layer's: with it, an activation that follows may keep ``x``
            and convolve again. Defaults to None.
        scale (Tensor, optional): Of a weight in 8 bits, see :mod:`~mmprotune.lean.int8`. Defaults
            to None.

    Returns:
        Tensor: The output.
    """
    check_frozen(weight, bias)
    if x.dim() == weight.dim() - 1:
        return convolution(x.unsqueeze(0), weight, bias, conv, owner, scale).squeeze(0)
    if not builds_graph(x):
        return conv.apply(x, weight, bias, scale)
    y = _Convolve.apply(x, weight, bias, conv, scale)
    y._lean_fresh = True
    if owner is not None:
        shape, memory_format = x.shape, memory_format_of(x)
        Producer(
            x, y, lambda x: conv.apply(x, weight, bias, scale),
            lambda grad: conv.input_gradient(grad, weight, shape, memory_format, scale),
            flops=(x if conv.transposed else y).numel() * weight.numel() // weight.size(0),
            owner=owner, weights=(weight, bias, scale))
    return y
