"""Activations. What each keeps is in its docstring."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..graph import Kept, Producer, builds_graph, once_differentiable
from ..precision import without_autocast
from .bits import fills_memory, pack_bits, select_bits

aten = torch.ops.aten

# --- one bit an element -----------------------------------------------------------------------


class _Clamp(Function):

    @staticmethod
    def forward(ctx, x, compute, passes, slope, gain, inplace):
        y = compute(x, inplace)
        if inplace:
            ctx.mark_dirty(x)
        mask = passes(y)
        if not fills_memory(mask):
            mask = mask.contiguous()
        ctx.size, ctx.stride, ctx.slope, ctx.gain = mask.size(), mask.stride(), slope, gain
        ctx.save_for_backward(pack_bits(mask))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        bits, = ctx.saved_tensors
        if grad.stride() != ctx.stride:
            grad = torch.empty_strided(
                ctx.size, ctx.stride, dtype=grad.dtype, device=grad.device).copy_(grad)
        picked = select_bits(grad, bits)
        if ctx.slope:
            picked = picked.add_(grad - picked, alpha=ctx.slope)
        if ctx.gain != 1:
            picked.mul_(ctx.gain)
        return picked, None, None, None, None, None


def clamp(x: Tensor,
          compute: Callable[[Tensor, bool], Tensor],
          passes: Callable[[Tensor], Tensor],
          slope: float = 0.,
          gain: float = 1.,
          inplace: bool = False) -> Tensor:
    """An activation whose derivative takes two values, which its output tells apart.

    Keeps one bit an element.

    Args:
        x (Tensor): Input of any shape.
        compute (Callable): The activation; takes the input and whether to work in place.
        passes (Callable): From the output, a tensor that is not zero where the derivative is
            ``gain``.
        slope (float): The derivative elsewhere, as a share of ``gain``. Defaults to 0.
        gain (float): The derivative. Defaults to 1.
        inplace (bool): Whether to overwrite ``x``. Defaults to False.
    """
    if not builds_graph(x) or x.numel() == 0 or (inplace and x._is_view()):
        return compute(x, inplace)
    return _Clamp.apply(x, compute, passes, slope, gain, inplace)


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``. Keeps one bit an element (PyTorch: the output)."""
    return clamp(x, F.relu, lambda y: y, inplace=inplace)


def hardtanh(x: Tensor, low: float = -1., high: float = 1., inplace: bool = False) -> Tensor:
    """``F.hardtanh``, and ReLU6 with 0 and 6. Keeps one bit an element (PyTorch: the input)."""
    return clamp(
        x,
        lambda x, inplace: F.hardtanh(x, low, high, inplace),
        lambda y: (y != low).logical_and_(y != high),
        inplace=inplace)


def leaky_relu(x: Tensor, slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``F.leaky_relu``. Keeps one bit an element (PyTorch: the input); no less for slopes below 0.
    """
    if slope < 0:
        return F.leaky_relu(x, slope, inplace)
    return clamp(
        x, lambda x, inplace: F.leaky_relu(x, slope, inplace), lambda y: y > 0, slope,
        inplace=inplace)


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.hardsigmoid``. Keeps one bit an element (PyTorch: the input)."""
    return clamp(
        x, F.hardsigmoid, lambda y: (y > 0).logical_and_(y < 1), gain=1 / 6, inplace=inplace)


# --- activations whose derivative needs their output ------------------------------------------


class _FromOutput(Function):

    @staticmethod
    def forward(ctx, x, compute, gradient):
        y = compute(x)
        ctx.save_for_backward(y)
        ctx.gradient = gradient
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.gradient(grad, *ctx.saved_tensors), None, None


def sigmoid(x: Tensor) -> Tensor:
    """``torch.sigmoid``. Keeps its output, as PyTorch does: whoever gates a feature with it keeps
    that anyway."""
    return _FromOutput.apply(x, torch.sigmoid, aten.sigmoid_backward) if builds_graph(
        x) else torch.sigmoid(x)


def tanh(x: Tensor) -> Tensor:
    """``torch.tanh``. Keeps its output, as PyTorch does."""
    return _FromOutput.apply(x, torch.tanh, aten.tanh_backward) if builds_graph(
        x) else torch.tanh(x)


# --- activations that need their input --------------------------------------------------------


@dataclass(frozen=True)
class Smooth:
    """An activation whose derivative needs its input.

    Attributes:
        compute (Callable): From the input to the output.
        gradient (Callable): From the output's gradient and the input to the input's gradient.
    """
    compute: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


GELU = Smooth(F.gelu, lambda grad, x: aten.gelu_backward(grad, x, approximate='none'))
GELU_TANH = Smooth(lambda x: F.gelu(x, approximate='tanh'),
                   lambda grad, x: aten.gelu_backward(grad, x, approximate='tanh'))
QUICK_GELU = Smooth(lambda x: x * torch.sigmoid(1.702 * x),
                    lambda grad, x: aten.silu_backward(grad, 1.702 * x))
SILU = Smooth(F.silu, aten.silu_backward)
HARDSWISH = Smooth(F.hardswish, aten.hardswish_backward)
MISH = Smooth(F.mish, aten.mish_backward)
# mmcv's Swish: SiLU written as a product, of which PyTorch keeps both factors.
SWISH = Smooth(lambda x: x * torch.sigmoid(x), aten.silu_backward)


class _Smooth(Function):

    @staticmethod
    def forward(ctx, x, act):
        ctx.save_for_backward(x)
        ctx.act = act
        return act.compute(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        with without_autocast(grad):
            return ctx.act.gradient(grad, x), None


class _Recomputed(Function):
    """The frozen layers before an activation, and the activation."""

    @staticmethod
    def forward(ctx, x, hidden, act, producer, kept):
        ctx.save_for_backward(kept.take())
        ctx.act, ctx.kept, ctx.dtype = act, kept, x.dtype
        ctx.replay, ctx.input_gradient = producer.replay(), producer.input_gradient()
        return act.compute(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden = ctx.replay(ctx.kept(*ctx.saved_tensors))
        with without_autocast(grad):
            grad = ctx.input_gradient(ctx.act.gradient(grad, hidden))
        return grad.to(ctx.dtype), None, None, None, None


def activation(x: Tensor, act: Smooth) -> Tensor:
    """GELU, QuickGELU, SiLU, Hardswish, Mish or Swish.

    Keeps its input. Where the frozen layers before it have an owner (see
    :func:`~mmprotune.lean.functional.convolution`): their input instead, of which the backward
    pass computes them again; nothing where that is the output of a frozen LayerNorm.

    Args:
        x (Tensor): Input of any shape.
        act (Smooth): Which activation.
    """
    if not builds_graph(x):
        return act.compute(x)
    producer = Producer.of(x)
    if producer is None:
        return _Smooth.apply(x, act)
    kept = Kept(producer.x)
    producer.tell(kept, x)
    return _Recomputed.apply(producer.x, x.detach(), act, producer, kept)
