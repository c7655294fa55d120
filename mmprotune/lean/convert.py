"""Makes a frozen network lean: the same results and gradients, fewer tensors saved.

Layers whose parameters are frozen become, in place, lean ones that save only what the gradient of
their input needs (:mod:`~mmprotune.lean.functional` says what that is). Parameters, buffers and the
keys of the state dict stay as they are.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmprotune.errors import OptionError

from .base import LeanLayer
from .dry_run import DryRun
from .graph import LeanState
from .int8 import dequantize, quantize
from .layers import Linear
from .memory import KeptBytes
from .options import LeanOptions, LeanReport
from .prompts import PromptState, observed
from .recompute import Planner
from .table import (
    ATTENTION,
    DROPS_WEIGHTS,
    STOCK_STORES_WEIGHTS,
    STORES_WEIGHTS,
    forward_name,
    lean_type,
    swap,
)

# What frozen weights can be stored in.
STORAGE_DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16, int8=torch.int8)
# Lean layers whose outputs may differ from the stock ones by rounding.
ROUNDS = (Linear, *ATTENTION)
# How far that may move an output of the network, relative to its largest value.
TOLERANCE = 1e-4


def make_lean(module: nn.Module,
              lean: bool | Mapping | LeanOptions = True,
              root: nn.Module | None = None,
              key: str = 'lean',
              prompts: nn.Module | None = None,
              shape: tuple[int, int, int] | None = None) -> LeanReport:
    """Makes the frozen layers of a network lean, in place.

    Runs the lean network on a small noise image, in eval mode and without touching any state, to
    see what is worth computing again; where layers may round otherwise, once more before, to see
    that the outputs are the same.

    Args:
        module (nn.Module): The network. Layers with a parameter that trains stay as they are.
        lean (bool | Mapping | LeanOptions): See :class:`LeanOptions`. Defaults to True.
        root (nn.Module, optional): What takes images and runs the network, with whatever trains
            around it. Defaults to None: the network itself.
        key (str): The config key of ``lean``, for error messages. Defaults to 'lean'.
        prompts (nn.Module, optional): Holds prompt blocks that run inside of ``root``; see
            :mod:`~mmprotune.lean.prompts`. Defaults to None.
        shape (tuple[int, int, int], optional): An image shape (C, H, W) at which the network is
            known to run. Defaults to None.

    Returns:
        LeanReport: What was done.

    Raises:
        TypeError, ValueError: ``lean`` is not valid.
    """
    options = LeanOptions.parse(lean, key)
    report = LeanReport()
    if options is None:
        return report
    for part in (module, prompts):
        if part is not None:
            restore(part)
    dry_run = DryRun(module if root is None else root, module, shape)
    _swap(module, options, report)
    rounding = [m.lean for m in module.modules() if options.rounds and isinstance(m, ROUNDS)]
    expected = dry_run.start() if rounding else None
    for state in rounding:
        state.rounds = True
    outputs = dry_run.start(lambda: _plan(module, prompts, options, dry_run, report))
    if outputs is None:
        report.remarks.append(f'the network ran at no usual image size ({dry_run.error}), so '
                              'nothing is computed again')
    if rounding and (error := _distance(outputs, expected)) > TOLERANCE:
        for state in rounding:
            state.rounds = False
        if outputs is not None:
            report.remarks.append(f'rounding moved outputs by {error:.1e}, so linear layers '
                                  'compute as the stock ones (as with rounds=False)')
    return report


def restore(module: nn.Module) -> None:
    """Makes every lean layer of a network ordinary again, in place. Weights in 8 bits, with which
    ordinary layers cannot compute, are stored in floating point again.

    Args:
        module (nn.Module): The network.
    """
    dequantize(module)
    for child in module.modules():
        if isinstance(child, LeanLayer):
            child.__class__ = child.stock_class
        if isinstance(child.__dict__.get('lean'), (LeanState, PromptState)):
            del child.__dict__['lean']


def store_weights(module: nn.Module,
                  dtype: str,
                  root: nn.Module | None = None,
                  key: str = 'dtype') -> list[str]:
    """Stores the weights of lean convolutions and linear layers in a lower precision, in place.

    A layer computes in the precision of its input: under autocast in autocast's, else with its
    weight converted for the moment. In 8 bits weights get a scale for each output channel (see
    :mod:`~mmprotune.lean.int8`), and biases stay as they are.

    Args:
        module (nn.Module): A lean network.
        dtype (str): One of ``STORAGE_DTYPES``.
        root (nn.Module, optional): See :func:`make_lean`. Defaults to None.
        key (str): The config key of ``dtype``, for error messages. Defaults to 'dtype'.

    Returns:
        list[str]: Names of convolutions and linear layers that stay as they are, being trained or
        not lean; in 8 bits also those whose weight is not finite, or is read by another module.

    Raises:
        ValueError: The network does not run with such weights.
    """
    dry_run = DryRun(module if root is None else root, module)
    with _called(module) as called:
        ran, kept = dry_run.start() is not None, []
    # These compute with the weights of their children, too; the encoder's only in inference.
    foreign = {child for parent in module.modules() if isinstance(
        parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        and not isinstance(parent, LeanLayer) for child in parent.modules()}
    if dtype == 'int8' and ran:
        # Whoever reads a weight itself does not know of a scale; lean attention does.
        called.update(child for parent in module.modules() if isinstance(parent, ATTENTION)
                      for child in parent.modules())
        foreign.update(set(module.modules()) - called)
    shared: dict[nn.Parameter, tuple] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, STORES_WEIGHTS) and layer not in foreign:
            if dtype == 'int8':
                names = [n for n, p in layer._parameters.items() if p is not None and p.dim() > 1]
                kept.extend(path for name in names if not quantize(layer, name, shared))
                continue
            for parameter in layer.parameters(recurse=False):
                if parameter.is_floating_point() and parameter.element_size() > 2:
                    parameter.data = parameter.data.to(STORAGE_DTYPES[dtype])
        elif isinstance(layer, STOCK_STORES_WEIGHTS):
            kept.append(path)
    if ran and dry_run() is None:
        raise OptionError(f'{key}={dtype!r} does not work with {type(module).__name__}: '
                          f'{dry_run.error}')
    return kept


@contextlib.contextmanager
def _called(module: nn.Module) -> Iterator[set[nn.Module]]:
    """While open, notes in the set that it yields which modules are called."""
    called: set[nn.Module] = set()
    handles = [child.register_forward_pre_hook(lambda child, _: called.add(child))
               for child in module.modules()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


# --- which layers -----------------------------------------------------------------------------


def _swap(module: nn.Module, options: LeanOptions, report: LeanReport) -> None:
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    for path, child in list(module.named_modules()):
        lean = lean_type(child)
        if lean is None:
            continue
        # Attention modules compute with their children's parameters too.
        of_attention = issubclass(lean, ATTENTION)
        if any(p.requires_grad for p in child.parameters(recurse=of_attention)):
            continue
        if of_attention and not options.attention:
            continue
        report.covered[path] = type(child).__name__
        state = swap(child, lean, path)
        state.sdpa = options.attention == 'sdpa'
        state.drops_weights = child in parents and forward_name(parents[child]) in DROPS_WEIGHTS


# --- what they do -----------------------------------------------------------------------------


def _plan(module: nn.Module, prompts: nn.Module | None, options: LeanOptions, dry_run: DryRun,
          report: LeanReport) -> list[Tensor] | None:
    """Runs the lean network once, and decides by that what it keeps."""
    with contextlib.ExitStack() as stack:
        sums = {}
        if prompts is not None and options.prompts:
            sums = stack.enter_context(observed(prompts, options.prompts))
        planner = stack.enter_context(Planner(module)) if options.budget else None
        kept = stack.enter_context(KeptBytes(dry_run.root))
        outputs = dry_run()
        if outputs is None:
            sums.clear()  # of a run that broke off, which shows nothing
            return None
        counted = kept.inside(module)
    if planner is not None:
        report.recomputed = planner.choose(options.budget)
    report.kept = sum(counted.values()) + (planner.left if planner else 0)
    report.ordinary = {path: n for path, n in counted.items()
                       if not isinstance(module.get_submodule(path), LeanLayer)}
    return outputs


def _distance(found: list[Tensor] | None, expected: list[Tensor] | None) -> float:
    """How far the outputs of a network have moved, relative to their largest values; infinite where
    it did not run."""
    if found is None or expected is None or len(found) != len(expected):
        return float('inf')
    return max((float((a.detach() - b).abs().max() / b.abs().max().clamp_min(1e-30))
                for a, b in zip(found, expected) if b.is_floating_point() and b.numel()),
               default=0.)
