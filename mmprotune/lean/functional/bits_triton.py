"""Packed masks on a GPU, one kernel each: PyTorch's operators take several passes over memory."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BYTES, ELEMENTS = 512, 2048  # of one block of threads


@triton.jit
def _pack(x, bits, count, block: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    bit = tl.arange(0, 8)
    element = byte[:, None] * 8 + bit[None, :]
    found = tl.load(x + element, mask=element < count, other=0) != 0
    packed = tl.sum(found.to(tl.int32) << bit[None, :], 1)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte * 8 < count)


@triton.jit
def _select(grad, bits, out, count, block: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = element < count
    byte = tl.load(bits + element // 8, mask=inside, other=0).to(tl.int32)
    passes = ((byte >> (element % 8).to(tl.int32)) & 1) != 0
    # What does not pass is not read: NaN and infinity there become zero, too.
    tl.store(out + element, tl.load(grad + element, mask=inside & passes, other=0), mask=inside)


def pack(x: Tensor) -> Tensor:
    """Packs which elements are not zero, in the order in which they lie in memory.

    Args:
        x (Tensor): On a GPU; bool or floating point, fills its memory.

    Returns:
        Tensor: uint8 tensor of shape (ceil(elements / 8), ).
    """
    count = x.numel()
    bits = torch.empty((count + 7) // 8, dtype=torch.uint8, device=x.device)
    if x.dtype is torch.bool:
        x = x.view(torch.uint8)
    with torch.cuda.device_of(x):
        _pack[-(-count // (8 * BYTES)), ](x, bits, count, block=BYTES)
    return bits


def select(grad: Tensor, bits: Tensor) -> Tensor:
    """The elements of ``grad`` whose bit is set; zero elsewhere.

    Args:
        grad (Tensor): On a GPU; fills its memory, in the same order as what was packed.
        bits (Tensor): What :func:`pack` returned.
    """
    count = grad.numel()
    out = torch.empty_like(grad)  # of the same strides, as the memory is filled
    with torch.cuda.device_of(grad):
        _select[-(-count // ELEMENTS), ](grad, bits, out, count, block=ELEMENTS)
    return out
