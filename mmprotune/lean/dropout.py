"""Dropout in prompt blocks that run twice: the same elements again."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .base import stand_in


def _dropouts(block: nn.Module) -> list[nn.Module]:
    return [m for m in block.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]


def drops(block: nn.Module) -> bool:
    """Whether the block drops elements, as it is now."""
    return any(m.training and m.p > 0 for m in _dropouts(block))


def as_now(block: nn.Module) -> nn.Module:
    """The block as it is, also once its mode is another one."""
    return stand_in(block, {}) if _dropouts(block) else block


class Draws:
    """The random numbers that a block with dropout is about to draw; a call, as a context, has them
    drawn again.

    Args:
        block (nn.Module): The block.
        x (Tensor): What it is given, on the device that it draws on.
    """

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        self.state = None
        if drops(block):
            self.state = torch.get_rng_state(), *get_device_states(x)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.state is None:
            yield
            return
        state, devices, states = self.state
        with torch.random.fork_rng(devices):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            yield
