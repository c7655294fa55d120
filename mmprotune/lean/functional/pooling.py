"""Pooling that keeps shapes instead of inputs. What each keeps is in its docstring."""
from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from ..graph import builds_graph, once_differentiable
from .convolution import memory_format_of

aten = torch.ops.aten


def _blank(ctx, grad: Tensor) -> Tensor:
    """A stand-in for the input, of which the backward operators read no more than the shape."""
    return torch.empty(
        ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)


def _note_shape(ctx, x: Tensor) -> None:
    ctx.shape, ctx.memory_format = x.shape, memory_format_of(x)


class _MaxPool2d(Function):

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, dilation, ceil_mode):
        y, indices = F.max_pool2d(
            x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
        _note_shape(ctx, x)
        ctx.settings = kernel, stride, padding, dilation, ceil_mode
        ctx.size, ctx.stride = indices.size(), indices.stride()
        ctx.save_for_backward(_within_window(indices, ctx).to(torch.uint8))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        places, = ctx.saved_tensors
        indices = _in_plane(places.long(), ctx)
        return aten.max_pool2d_with_indices_backward(
            grad, _blank(ctx, grad), *ctx.settings, indices), None, None, None, None, None


def _corners(ctx, device) -> tuple[Tensor, Tensor]:
    """Row and column of each output pixel's window, shapes (rows, 1) and (columns, )."""
    _, stride, padding, *_ = ctx.settings
    rows, columns = (torch.arange(n, device=device) * s - p
                     for n, s, p in zip(ctx.size[-2:], stride, padding))
    return rows.unsqueeze(1), columns


def _within_window(indices: Tensor, ctx) -> Tensor:
    """Places within each window, counted in row order, from places within the plane."""
    kernel, _, _, dilation, _ = ctx.settings
    rows, columns = _corners(ctx, indices.device)
    row = (indices.div(ctx.shape[-1], rounding_mode='floor') - rows).div_(
        dilation[0], rounding_mode='floor')
    column = (indices.remainder(ctx.shape[-1]) - columns).div_(dilation[1], rounding_mode='floor')
    return row.mul_(kernel[1]).add_(column)


def _in_plane(places: Tensor, ctx) -> Tensor:
    """The inverse of :func:`_within_window`."""
    kernel, _, _, dilation, _ = ctx.settings
    rows, columns = _corners(ctx, places.device)
    row = places.div(kernel[1], rounding_mode='floor').mul_(dilation[0]).add_(rows)
    return row.mul_(ctx.shape[-1]).add_(places.remainder_(kernel[1]).mul_(dilation[1])).add_(
        columns)


def max_pool2d(x: Tensor, kernel_size, stride=None, padding=0, dilation=1,
               ceil_mode: bool = False) -> Tensor:
    r"""``F.max_pool2d``.

    Keeps one byte an output element, the place of the maximum in its window (PyTorch: the input,
    the output's 8-byte indices); nothing less than PyTorch for windows of more than 256 pixels.

    Args:
        x (Tensor): Input of shape (N, C, H, W) or (C, H, W).
        kernel_size, stride, padding, dilation, ceil_mode: See ``F.max_pool2d``.
    """
    kernel, padding, dilation = _pair(kernel_size), _pair(padding), _pair(dilation)
    stride = kernel if stride is None else _pair(stride)
    if not builds_graph(x) or kernel[0] * kernel[1] > 256 or x.numel() == 0:
        return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    return _MaxPool2d.apply(x, kernel, stride, padding, dilation, ceil_mode)


class _AvgPool2d(Function):

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, *rest):
        _note_shape(ctx, x)
        ctx.settings = kernel, stride, padding, *rest
        return F.avg_pool2d(x, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = aten.avg_pool2d_backward(grad, _blank(ctx, grad), *ctx.settings)
        return grad, None, None, None, None, None, None


def avg_pool2d(x: Tensor,
               kernel_size,
               stride=None,
               padding=0,
               ceil_mode: bool = False,
               count_include_pad: bool = True,
               divisor_override: int | None = None) -> Tensor:
    """``F.avg_pool2d``. Keeps nothing (PyTorch: the input, for its shape).

    Args:
        x (Tensor): Input of shape (N, C, H, W) or (C, H, W).
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: See
            ``F.avg_pool2d``.
    """
    kernel = _pair(kernel_size)
    settings = (kernel, kernel if stride is None else _pair(stride), _pair(padding), ceil_mode,
                count_include_pad, divisor_override)
    if not builds_graph(x) or x.numel() == 0:
        return F.avg_pool2d(x, *settings)
    return _AvgPool2d.apply(x, *settings)


class _AdaptiveAvgPool2d(Function):

    @staticmethod
    def forward(ctx, x, size):
        _note_shape(ctx, x)
        return F.adaptive_avg_pool2d(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if grad.shape[-2:] == (1, 1):
            pixels = ctx.shape[-2] * ctx.shape[-1]
            return (grad / pixels).expand(ctx.shape), None
        return aten._adaptive_avg_pool2d_backward(grad.contiguous(), _blank(ctx, grad)), None


def adaptive_avg_pool2d(x: Tensor, output_size) -> Tensor:
    """``F.adaptive_avg_pool2d``. Keeps nothing (PyTorch: the input, for its shape).

    Args:
        x (Tensor): Input of shape (N, C, H, W) or (C, H, W).
        output_size (int | tuple): See ``F.adaptive_avg_pool2d``.
    """
    if not builds_graph(x) or x.numel() == 0:
        return F.adaptive_avg_pool2d(x, output_size)
    return _AdaptiveAvgPool2d.apply(x, output_size)
