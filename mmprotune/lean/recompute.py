"""Recomputation: which layers the backward pass applies again instead of saving their output."""
from __future__ import annotations

from torch import Tensor, nn

from .dry_run import USUAL_SIZE, DryRun
from .graph import LeanState, Producer
from .layers import Conv, Linear
from .table import ATTENTION


def plan(module: nn.Module, budget: float, dry_run: DryRun) -> list[str]:
    """Chooses what the backward pass computes again: most bytes for a multiplication first.

    Args:
        module (nn.Module): The lean network.
        budget (float): See ``recompute`` of :class:`~mmprotune.lean.options.LeanOptions`.
        dry_run (DryRun): Runs it.

    Returns:
        list[str]: Names of the layers that are applied again.
    """
    if not budget:
        return []
    layers = [m for m in module.modules() if isinstance(m, (Conv, Linear, *ATTENTION))]
    found: dict[tuple[LeanState, ...], tuple[int, int]] = {}
    work = 0

    def note_work(layer, args, output) -> None:
        nonlocal work
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(layer, ATTENTION):
            # Its projections may be no modules of their own.
            weight = getattr(layer, 'in_proj_weight', None)
            flops = 0 if weight is None else output.numel() // output.size(-1) * weight.numel()
        else:
            flops = _flops(layer, args[0], output)
        work += flops * (2 if output.requires_grad else 1)

    def observe(producer: Producer, saved: int) -> None:
        bytes_, flops = found.get(producer.owners, (0, 0))
        found[producer.owners] = bytes_ + saved, flops + producer.flops

    handles = [layer.register_forward_hook(note_work) for layer in layers]
    for layer in layers:
        layer.lean.recomputes, layer.lean.observer = True, observe
    try:
        if dry_run(size=USUAL_SIZE) is None:
            found.clear()
            work = 0
            dry_run()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.lean.recomputes, layer.lean.observer = False, None
    used, chosen = 0, []
    for owners in sorted(found, key=lambda o: found[o][0] / found[o][1], reverse=True):
        saved, flops = found[owners]
        if saved > 0 and used + flops <= budget * work:
            used += flops
            for owner in owners:
                owner.recomputes = True
                chosen.append(owner.name)
    return chosen


def _flops(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiplications of one call of a convolution or linear layer."""
    if getattr(layer, 'transposed', False):
        return x.numel() * layer.weight.numel() // layer.weight.size(0)
    return output.numel() * layer.weight.numel() // layer.weight.size(0)
