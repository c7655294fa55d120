"""Masks, packed eight elements to a byte."""
from __future__ import annotations

import functools
import warnings
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_GATHER = 0x0102040810204080  # brings the lowest bits of 8 bytes together in the highest byte
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_rows: dict[torch.dtype, Tensor] = {}


@functools.cache
def _kernels() -> ModuleType | None:
    """Kernels of our own for a GPU; None where Triton is missing or does not compile here."""
    try:
        from . import bits_triton
        found = bits_triton.pack(torch.ones(3, dtype=torch.bool, device='cuda'))
        bits_triton.select(torch.ones(3, device='cuda'), found)
    except Exception as error:  # no compiler, a GPU that it does not know, …
        warnings.warn(f'Triton compiles no kernels here ({type(error).__name__}): masks are packed '
                      "by PyTorch's operators, which takes longer", stacklevel=2)
        return None
    return bits_triton


def kernels_for(x: Tensor) -> ModuleType | None:
    """What packs on the device of ``x`` in one kernel; None for PyTorch's operators."""
    return _kernels() if x.is_cuda and type(x) is Tensor else None


def pack_bits(mask: Tensor) -> Tensor:
    """Packs which elements are not zero, 8 to a byte, in the order in which they lie in memory.

    Args:
        mask (Tensor): Bool or floating-point tensor that fills its memory without gaps or overlaps.

    Returns:
        Tensor: uint8 tensor of shape (ceil(elements / 8), ).
    """
    kernels = kernels_for(mask)
    if kernels is not None:
        return kernels.pack(mask)
    flat = mask.as_strided((mask.numel(), ), (1, )).bool()
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
    kernels = kernels_for(grad)
    if kernels is not None:
        return kernels.select(grad, bits)
    flat = grad.as_strided((grad.numel(), ), (1, ), grad.storage_offset())
    if grad.device.type != 'cpu':
        return select_bits_anywhere(flat, bits).as_strided(grad.size(), grad.stride())
    integer = _INTEGERS[grad.element_size()]
    if integer not in _rows:  # for each byte 8 integers: all their bits set where its bit is set
        bit = torch.arange(256).unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and_(1)
        _rows[integer] = bit.neg_().to(integer)
    masks = torch.index_select(_rows[integer], 0, bits.int()).view(-1)[:grad.numel()]
    masks.bitwise_and_(flat.view(integer))
    return masks.view(grad.dtype).as_strided(grad.size(), grad.stride())


def select_bits_anywhere(flat: Tensor, bits: Tensor) -> Tensor:
    """:func:`select_bits` of a flat gradient without a table: GPUs look rows up slowly."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    passes = bits.unsqueeze(1).bitwise_right_shift(places).bitwise_and_(1).view(-1)[:flat.numel()]
    return torch.where(passes.bool(), flat, 0)


def fills_memory(x: Tensor) -> bool:
    """Whether the elements lie in memory without gaps or overlaps."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
