"""Folding: which frozen norm is computed as part of which frozen convolution."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .dry_run import DryRun
from .graph import is_recorded, is_running
from .layers import BatchNorm, Conv, LeanLayer
from .table import lean_type

# How far folding norms may move an output, relative to its largest value.
TOLERANCE = 1e-4


class Pair:
    """A frozen convolution and the frozen norm that alone reads its output.

    Args:
        conv (nn.Module): The convolution, lean.
        norm (nn.Module): The norm, lean.
        parent (nn.Module): The module that holds the norm.
        name (str): Its name there.
        network (nn.Module): The network that both are in.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, parent: nn.Module, name: str,
                 network: nn.Module) -> None:
        self.conv, self.norm, self.parent, self.name = conv, norm, parent, name
        self.network = network

    def __deepcopy__(self, memo: dict) -> Pair | None:
        # A layer that is copied without its network is put elsewhere, as by PyTorch's
        # `fuse_conv_bn_eval`: it is no half of a pair there.
        if id(self.network) not in memo:
            return None
        memo[id(self)] = other = Pair.__new__(Pair)  # the two refer to it
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def is_active(self) -> bool:
        """Whether the two are one now: while their network runs, and not where somebody calls the
        convolution by itself. Hooks on either see what they would see in the stock network, so with
        hooks they are two (but with those that say ``allows_folding``); so they are once somebody
        replaces the norm (MMEngine's ``revert_sync_batchnorm`` does), the way that one of them is
        called, or lets one of them train, and while the network is recorded."""
        conv, norm = self.conv, self.norm
        return self.parent._modules.get(self.name) is norm and not is_recorded() and is_running(
        ) and not (
            norm.training
            or not all(getattr(hook, 'allows_folding', False)
                       for hook in (*conv._forward_hooks.values(), *norm._forward_hooks.values()))
            or norm._forward_pre_hooks or conv._backward_hooks or norm._backward_hooks
            or conv._backward_pre_hooks or norm._backward_pre_hooks
            or _is_replaced(conv) or _is_replaced(norm)
            or any(p is not None and p.requires_grad for p in (*conv._parameters.values(),
                                                               *norm._parameters.values()))
            or conv.weight.device != norm.running_var.device)

    def mark(self, y: Tensor) -> None:
        """Tells the norm that a tensor, the convolution's output, is normed already."""
        y._lean_normed_by = self

    def affine(self) -> tuple[Tensor, Tensor]:
        """The norm as a factor and an offset for each channel."""
        norm = self.norm
        with torch.no_grad():
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            if norm.bias is None:
                return scale, -norm.running_mean * scale
            return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


def _is_replaced(layer: nn.Module) -> bool:
    """Whether somebody put another ``forward`` on a layer; one that says ``keeps_result`` returns
    what the layer's own would."""
    forward = layer.__dict__.get('forward')
    return forward is not None and not getattr(forward, 'keeps_result', False)


def find_pairs(module: nn.Module, dry_run: DryRun) -> tuple[
        list[tuple[nn.Module, nn.Module]], list[Tensor]]:
    """Frozen convolutions, each with the one frozen norm that alone reads its output.

    Args:
        module (nn.Module): The network, not lean yet.
        dry_run (DryRun): Runs it, for the first time.

    Returns:
        tuple[list[tuple[nn.Module, nn.Module]], list[Tensor]]: The pairs, and what the network
        returned.
    """

    def candidates(lean: type) -> list[nn.Module]:
        found = []
        for child in module.modules():
            cls = lean_type(child)
            if cls is not None and issubclass(cls, lean) and not any(
                    p.requires_grad for p in child.parameters()):
                found.append(child)
        return found

    made: dict[nn.Module, list[Tensor]] = {}
    read: dict[nn.Module, list[Tensor]] = {}
    nodes: dict[int, object] = {}

    def note_output(conv, _, output) -> None:
        made.setdefault(conv, []).append(output)
        nodes[id(output)] = output.grad_fn

    def note_input(norm, args) -> None:
        read.setdefault(norm, []).extend(args[:1])

    handles = [m.register_forward_hook(note_output) for m in candidates(Conv)]
    handles += [m.register_forward_pre_hook(note_input) for m in candidates(BatchNorm)]
    try:
        outputs = dry_run.start(lambda: (made.clear(), read.clear(), nodes.clear())) or []
        readers = _count_readers(outputs)
    finally:
        for handle in handles:
            handle.remove()
    by_tensor = {id(tensors[0]): norm for norm, tensors in read.items() if len(tensors) == 1}
    pairs = []
    for conv, tensors in made.items():
        norm = by_tensor.get(id(tensors[0]))
        # Not if it was called twice, was changed in between, or has another reader.
        if (norm is not None and len(tensors) == 1 and tensors[0].grad_fn is nodes[id(tensors[0])]
                and readers.get(tensors[0].grad_fn) == 1):
            pairs.append((conv, norm))
    return pairs, [output.detach() for output in outputs]


def _count_readers(outputs: list[Tensor]) -> dict[object, int]:
    """How often each node of the graph behind some outputs is read."""
    readers: dict[object, int] = {}
    queue = [t.grad_fn for t in outputs if t.grad_fn is not None]
    for node in queue:
        readers[node] = readers.get(node, 0) + 1
    seen = set(queue)
    while queue:
        for node, _ in queue.pop().next_functions:
            if node is not None:
                readers[node] = readers.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    queue.append(node)
    return readers


def fold(module: nn.Module, pairs: list[Pair]) -> None:
    """Folds norms into convolutions, and lets all lean layers round differently.

    Args:
        module (nn.Module): The lean network.
        pairs (list[Pair]): What to fold.
    """
    for layer in module.modules():
        if isinstance(layer, LeanLayer):
            layer.lean.rounds = True
    for pair in pairs:
        pair.conv.lean.pair = pair.norm.lean.pair = pair


def unfold(module: nn.Module) -> None:
    """Undoes ``fold``, in place: each norm runs by itself, outputs are bitwise the stock ones.

    Args:
        module (nn.Module): The network.
    """
    for layer in module.modules():
        if isinstance(layer, LeanLayer):
            layer.lean.pair, layer.lean.rounds = None, False


def distance(found: list[Tensor] | None, expected: list[Tensor] | None) -> float:
    """How far the outputs of a network have moved, relative to their largest values; infinite where
    it did not run."""
    if found is None or expected is None or len(found) != len(expected):
        return float('inf')
    return max((_difference(a, b) for a, b in zip(found, expected)), default=0.)


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point() or not expected.numel():
        return 0.
    return float((found.detach() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
