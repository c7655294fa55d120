"""Recomputation: which layers the backward pass applies again instead of saving their output."""
from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .graph import LeanState, Producer
from .layers import Conv, Linear
from .table import ATTENTION


class Planner:
    """Chooses what the backward pass computes again, from a run of the lean network in a graph
    while this context is open. In that run everything that could be is computed again.

    Args:
        module (nn.Module): The lean network.

    Attributes:
        left (int): Bytes that the choice leaves in memory and that run did not keep.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = [m for m in module.modules() if isinstance(m, (Conv, Linear, *ATTENTION))]
        self._found: dict[tuple[LeanState, ...], tuple[int, int]] = {}
        self._inputs: dict[tuple[LeanState, ...], list[tuple[Tensor, int]]] = {}
        self._work = 0
        self._handles: list[RemovableHandle] = []
        self.left = 0

    def __enter__(self) -> Planner:
        self._handles = [layer.register_forward_hook(self._note_work) for layer in self._layers]
        for layer in self._layers:
            layer.lean.recomputes, layer.lean.observer = True, self._observe
        return self

    def __exit__(self, *exc_info) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.lean.recomputes, layer.lean.observer = False, None

    def _note_work(self, layer: nn.Module, args: tuple, output) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(layer, ATTENTION):
            weight = layer._own_weight()
            flops = 0 if weight is None else output.numel() // output.size(-1) * weight.numel()
        else:
            flops = _flops(layer, args[0], output)
        self._work += flops * (2 if output.requires_grad else 1)

    def _observe(self, producer: Producer, saved: int) -> None:
        bytes_, flops = self._found.get(producer.owners, (0, 0))
        self._found[producer.owners] = bytes_ + saved, flops + producer.flops
        self._inputs.setdefault(producer.owners, []).append(
            (producer.x.detach(), producer.x._version))

    def choose(self, budget: float) -> list[str]:
        """Most bytes for a multiplication first. Layers whose input the network changes in place
        later are not applied again.

        Args:
            budget (float): See ``recompute`` of :class:`~mmprotune.lean.options.LeanOptions`.

        Returns:
            list[str]: Names of the layers that are applied again.
        """
        used, chosen = 0, []
        found = self._found
        for owners in sorted(found, key=lambda o: found[o][0] / found[o][1], reverse=True):
            saved, flops = found[owners]
            stays = all(x._version == version for x, version in self._inputs[owners])
            if stays and saved > 0 and used + flops <= budget * self._work:
                used += flops
                for owner in owners:
                    owner.recomputes = True
                    chosen.append(owner.name)
            else:
                self.left += max(saved, 0)
        return chosen


def _flops(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiplications of one call of a convolution or linear layer."""
    if getattr(layer, 'transposed', False):
        return x.numel() * layer.weight.numel() // layer.weight.size(0)
    return output.numel() * layer.weight.numel() // layer.weight.size(0)
