"""Activations. What each keeps is in its docstring."""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..graph import Kept, Producer, builds_graph, without_autocast

aten = torch.ops.aten

# --- one bit an element -----------------------------------------------------------------------

_GATHER = 0x0102040810204080  # brings the lowest bits of 8 bytes together in the highest byte
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_rows: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a mask 8 elements to a byte, in the order in which they lie in memory.

    Args:
        mask (Tensor): Bool tensor that fills its memory without gaps or overlaps.

    Returns:
        Tensor: uint8 tensor of shape (ceil(elements / 8), ).
    """
    flat = mask.as_strided((mask.numel(), ), (1, ))
    if flat.device.type == 'cpu' and type(flat) is Tensor:
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder='little'))
    return pack_bits_anywhere(flat)


def pack_bits_anywhere(flat: Tensor) -> Tensor:
    """:func:`pack_bits` of a flat mask by PyTorch's operators alone, for any device."""
    padded = F.pad(flat.view(torch.uint8), (0, -flat.numel() % 8))
    words = padded.view(torch.int64) * _GATHER
    return words.view(torch.uint8).view(-1, 8)[:, 7].contiguous()


def select_bits(grad: Tensor, bits: Tensor) -> Tensor:
    """The elements of ``grad`` whose bit is set, NaN and infinity included; zero elsewhere.

    Args:
        grad (Tensor): Fills its memory, in the same order as the packed mask.
        bits (Tensor): What :func:`pack_bits` returned.
    """
    integer = _INTEGERS[grad.element_size()]
    key = grad.device, integer
    if key not in _rows:  # for each byte 8 integers: all their bits set where its bit is set
        bit = torch.arange(256).unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and_(1)
        _rows[key] = bit.neg_().to(*key)
    masks = torch.index_select(_rows[key], 0, bits.int()).view(-1)[:grad.numel()]
    flat = grad.as_strided((grad.numel(), ), (1, ), grad.storage_offset())
    masks.bitwise_and_(flat.view(integer))
    return masks.view(grad.dtype).as_strided(grad.size(), grad.stride())


def _fills_memory(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class _Clamp(Function):

    @staticmethod
    def forward(ctx, x, compute, passes, slope, gain, inplace):
        y = compute(x, inplace)
        if inplace:
            ctx.mark_dirty(x)
        mask = passes(y)
        if not _fills_memory(mask):
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
        passes (Callable): From the output, a mask of where the derivative is ``gain``.
        slope (float): The derivative elsewhere, as a share of ``gain``. Defaults to 0.
        gain (float): The derivative. Defaults to 1.
        inplace (bool): Whether to overwrite ``x``. Defaults to False.
    """
    if not builds_graph(x) or x.numel() == 0 or (inplace and x._is_view()):
        return compute(x, inplace)
    return _Clamp.apply(x, compute, passes, slope, gain, inplace)


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """``F.relu``. Keeps one bit an element (PyTorch: the output)."""
    return clamp(x, F.relu, Tensor.bool, inplace=inplace)


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


class _Watch(threading.local):
    """Who plans on this thread."""
    observer: Callable[[Producer, int], None] | None = None


_watch = _Watch()


@contextlib.contextmanager
def observed(observer: Callable[[Producer, int], None]) -> Iterator[None]:
    """While open, this thread tells what could be computed again.

    Args:
        observer (Callable): Takes the producer, and the bytes that would be saved.
    """
    before, _watch.observer = _watch.observer, observer
    try:
        yield
    finally:
        _watch.observer = before


def observe(producer: Producer, kept: Kept, result: Tensor) -> None:
    """Tells the observer what keeping the producer's input instead of ``result`` would save."""
    if _watch.observer is not None:
        _watch.observer(producer, result.nbytes - (0 if kept.is_free else producer.x.nbytes))


def activation(x: Tensor, act: Smooth) -> Tensor:
    """GELU, SiLU, Hardswish, Mish or Swish.

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
    observe(producer, kept, x)
    return _Recomputed.apply(producer.x, x.detach(), act, producer, kept)
