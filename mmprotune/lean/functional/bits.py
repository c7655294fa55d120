"""Masks, packed eight elements to a byte."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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


def fills_memory(x: Tensor) -> bool:
    """Whether the elements lie in memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
