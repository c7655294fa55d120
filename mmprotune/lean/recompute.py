"""What a dry run tells about a frozen network: which norm folds into which convolution, what is
worth computing again, and what keeps bytes in the ordinary way.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from . import layers as twins
from .dry_run import image_shapes, noise, nothing_saved, tensors_in, undisturbed
from .functional import activations
from .graph import Producer, run_folded
from .memory import KeptBytes

# Work is compared at a usual size: on small images, padding distorts it.
USUAL_SIZE = (224, 224)
# How far folding norms or another memory format may move an output, relative to its largest value.
TOLERANCE = 1e-4


class DryRun:
    """Runs a network on a small noise image without touching its state.

    Args:
        root (nn.Module): What takes images and runs the network.
        network (nn.Module): The network.

    Attributes:
        shape (tuple[int, int, int], optional): The first image shape (C, H, W) at which the network
            runs; None where it runs at none.
        error (str, optional): Why it did not run at the first shape tried.
    """

    def __init__(self, root: nn.Module, network: nn.Module) -> None:
        self.root = root
        self.error: str | None = None
        # Of the images, also once weights are stored in another precision.
        self._dtype = noise(root, (1, 1, 1), 1).dtype
        self._trains = any(p.requires_grad for p in root.parameters())
        self.shape: tuple[int, int, int] | None = None
        for shape in image_shapes(network):
            self.shape = shape
            if self() is not None:
                return
        self.shape = None

    def __call__(self, through: bool = False,
                 size: tuple[int, int] | None = None) -> list[Tensor] | None:
        """Runs the network once, in a graph.

        Args:
            through (bool): Whether the image requires a gradient, so that the graph goes through
                all layers. Otherwise only where nothing trains. Defaults to False.
            size (tuple[int, int], optional): Of the image. Defaults to None: that of ``shape``.

        Returns:
            list[Tensor], optional: The outputs; None where the network does not run.
        """
        return self._run(1, size, through or not self._trains)

    def infer(self) -> list[Tensor] | None:
        """Runs the network once, on two images of a usual size and without a graph.

        Returns:
            list[Tensor], optional: The outputs; None where the network does not run.
        """
        outputs = self._run(2, USUAL_SIZE, None)
        return self._run(2, None, None) if outputs is None else outputs

    def _run(self, batch: int, size: tuple[int, int] | None,
             through: bool | None) -> list[Tensor] | None:
        """``through`` is None for no graph."""
        # Leaving inference mode switches gradients on, so that they are set last.
        with undisturbed(self.root), torch.inference_mode(False), torch.set_grad_enabled(
                through is not None):
            shape = self.shape if size is None else (self.shape[0], *size)
            images = noise(self.root, shape, batch).to(self._dtype)
            try:
                images = images.requires_grad_(bool(through))
                return list(tensors_in(run_folded(self.root, images)))
            except Exception as error:  # whatever it is: not at this size
                self.error = self.error or f'{type(error).__name__}: {error}'
        return None


# --- folding ----------------------------------------------------------------------------------


def find_pairs(module: nn.Module, dry_run: DryRun) -> list[tuple[nn.Module, nn.Module]]:
    """Frozen convolutions, each with the one frozen norm that alone reads its output.

    Args:
        module (nn.Module): The network, not lean yet.
        dry_run (DryRun): Runs it.
    """

    def candidates(mixin: type) -> list[nn.Module]:
        found = []
        for child in module.modules():
            cls = twins.twin_of(child)
            if cls is not None and issubclass(cls, mixin) and not any(
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

    handles = [m.register_forward_hook(note_output) for m in candidates(twins.CONVOLUTIONS)]
    handles += [m.register_forward_pre_hook(note_input) for m in candidates(twins.NORMS)]
    try:
        with nothing_saved():
            readers = _count_readers(dry_run(through=True) or [])
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
    return pairs


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


def fold(pairs: list[twins.Pair], dry_run: DryRun,
         expected: list[Tensor] | None) -> float | None:
    """Folds norms into convolutions and lets all lean layers, those of prompts too, round
    differently, and undoes both should the outputs not be the same.

    Args:
        pairs (list[Pair]): What to fold.
        dry_run (DryRun): Runs the network.
        expected (list[Tensor], optional): What its ``infer`` returned before.

    Returns:
        float, optional: None where they are folded; else how far it moved outputs.
    """
    layers = [m for m in dry_run.root.modules() if isinstance(m, twins.Twin)]
    for layer in layers:
        layer.__dict__['lean_fast'] = True
    for pair in pairs:
        pair.conv.__dict__['lean_pair'] = pair.norm.__dict__['lean_pair'] = pair
    error = _distance(dry_run.infer(), expected)
    if error <= TOLERANCE:
        return None
    for layer in layers:
        for name in ('lean_fast', 'lean_pair'):
            layer.__dict__.pop(name, None)
    return error


def _distance(found: list[Tensor] | None, expected: list[Tensor] | None) -> float:
    """How far the outputs of a network have moved; infinite where it did not run."""
    if found is None or expected is None or len(found) != len(expected):
        return float('inf')
    return max((_difference(a, b) for a, b in zip(found, expected)), default=0.)


def _difference(found: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point() or not expected.numel():
        return 0.
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


# --- memory format ----------------------------------------------------------------------------


def share_in_maps(module: nn.Module, dry_run: DryRun) -> tuple[float, list[Tensor] | None]:
    """The share of a network's multiplications that are convolutions of maps, and its outputs.

    Args:
        module (nn.Module): The network.
        dry_run (DryRun): Runs it.
    """
    in_maps = total = 0

    def note_work(layer, args, output) -> None:
        nonlocal in_maps, total
        flops = _flops(layer, args[0], output)
        total += flops
        in_maps += flops if isinstance(layer, nn.Conv2d) else 0

    handles = [layer.register_forward_hook(note_work) for layer in module.modules()
               if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear))]
    try:
        outputs = dry_run.infer()
    finally:
        for handle in handles:
            handle.remove()
    return in_maps / max(1, total), outputs


def set_channels_last(module: nn.Module, dry_run: DryRun, expected: list[Tensor] | None) -> bool:
    """Sets a network to run channels-last without a graph, unless that gives other outputs.

    Args:
        module (nn.Module): The lean network.
        dry_run (DryRun): Runs it.
        expected (list[Tensor], optional): What its ``infer`` returned before.

    Returns:
        bool: Whether it is set.
    """
    module.__dict__['lean_channels_last'] = True
    if _distance(dry_run.infer(), expected) <= TOLERANCE:
        return True
    del module.__dict__['lean_channels_last']
    return False


# --- what is computed again -------------------------------------------------------------------


def plan(module: nn.Module, budget: float, dry_run: DryRun) -> list[str]:
    """Chooses what the backward pass computes again: most bytes for a multiplication first.

    Args:
        module (nn.Module): The lean network.
        budget (float): See ``recompute`` of :class:`~mmprotune.lean.convert.LeanOptions`.
        dry_run (DryRun): Runs it.

    Returns:
        list[str]: Names of the layers that are applied again.
    """
    if not budget:
        return []
    layers = {p: m for p, m in module.named_modules()
              if isinstance(m, (twins.CONVOLUTIONS, twins.LINEAR, *twins.ATTENTION))}
    found: dict[tuple, tuple[int, int]] = {}
    work = 0

    def note_work(layer, args, output) -> None:
        nonlocal work
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(layer, twins.ATTENTION):
            # Its projections may be no modules of their own.
            weight = getattr(layer, 'in_proj_weight', None)
            flops = 0 if weight is None else output.numel() // output.size(-1) * weight.numel()
        else:
            flops = _flops(layer, args[0], output)
        work += flops * (2 if output.requires_grad else 1)

    def observe(producer: Producer, saved: int) -> None:
        bytes_, flops = found.get(producer.owners, (0, 0))
        found[producer.owners] = bytes_ + saved, flops + producer.flops

    handles = [layer.register_forward_hook(note_work) for layer in layers.values()]
    for layer in layers.values():
        layer.__dict__['lean_marks'] = True
    try:
        with activations.observed(observe):
            if dry_run(size=USUAL_SIZE) is None:
                found.clear()
                work = 0
                dry_run()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.__dict__['lean_marks'] = False
    used, chosen = 0, []
    for owners in sorted(found, key=lambda o: found[o][0] / found[o][1], reverse=True):
        saved, flops = found[owners]
        if saved > 0 and used + flops <= budget * work:
            used += flops
            for owner in owners:
                layers[owner].__dict__['lean_marks'] = True
            chosen.extend(owners)
    return chosen


def _flops(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """Multiplications of one call of a convolution or linear layer."""
    if getattr(layer, 'transposed', False):
        return x.numel() * layer.weight.numel() // layer.weight.size(0)
    return output.numel() * layer.weight.numel() // layer.weight.size(0)


def kept_bytes(module: nn.Module, dry_run: DryRun) -> dict[str, int]:
    """Bytes that the backward pass keeps for a network, by dotted name of the module in it.

    Args:
        module (nn.Module): The network.
        dry_run (DryRun): Runs it, with what trains around it.
    """
    with KeptBytes(dry_run.root) as kept:
        outputs = dry_run()
    prefix = next(path for path, m in dry_run.root.named_modules() if m is module)
    counted = {f'.{path}': n for path, n in kept.by_module().items()}
    del outputs
    start = f'.{prefix}.' if prefix else '.'
    return {path[len(start):]: n for path, n in counted.items() if f'{path}.'.startswith(start)}
