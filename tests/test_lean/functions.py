"""Draws, and counts what lean functions keep."""

import torch
from torch import nn

from mmprotune.lean import functional as lean
from mmprotune.lean.memory import KeptBytes


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept(function, *inputs) -> int:
    """Bytes kept by a function, its inputs that exist anyway not excluded."""
    with KeptBytes(nn.Module()) as bytes_:
        output = function(*inputs)
    total = bytes_.total()
    del output
    return total


def settings(dims=2, stride=1, padding=0, dilation=1, groups=1, **kwargs) -> lean.Convolution:
    return lean.Convolution([stride] * dims, [padding] * dims, [dilation] * dims, groups, **kwargs)
