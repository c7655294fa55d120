"""Makes a frozen network lean: the same results and gradients, a backward pass that keeps less.

Layers whose parameters are frozen are replaced, in place, by twins that keep only what the
gradient of their input needs (:mod:`~mmprotune.lean.functional` says what that is). Parameters,
buffers and the keys of the state dict stay as they are.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import nn

from . import layers as twins
from .prompts import watch_additions
from .recompute import (
    DryRun,
    find_pairs,
    fold,
    kept_bytes,
    plan,
    set_channels_last,
    share_in_maps,
)

# What frozen weights can be stored in.
STORAGE_DTYPES = dict(bfloat16=torch.bfloat16, float16=torch.float16)


@dataclass
class LeanOptions:
    """What ``lean=dict(…)`` may hold.

    Attributes:
        fold (bool): Whether outputs may move by rounding: a frozen BatchNorm becomes part of the
            convolution before it, where it alone reads the convolution's output; on a CPU linear
            layers (and on one thread 1x1 convolutions) go to oneDNN, and networks of convolutions
            run channels-last where there is no graph to build. Undone where a dry run shows other
            outputs. Defaults to True.
        recompute (float): Work that the backward pass may do twice, as a share of the frozen
            network's multiplications in a training step. It goes where a multiplication saves most
            bytes: hidden layers of MLPs, queries, keys and values. 0 means nothing, True anything.
            Defaults to 0.08.
        attention (str | bool): 'exact' keeps queries, keys and values, and repeats the host's own
            operations; 'sdpa' uses ``F.scaled_dot_product_attention`` where there is no bias,
            which moves outputs by rounding; False leaves attention as it is. Defaults to 'exact'.
        prompts (str | bool): What prompt blocks keep, computing the rest again: 'output' their
            feature with the prompt added (which the layers behind keep anyway) and their
            bottleneck, 'bottleneck' the feature without it and their bottleneck, 'input' the
            feature without it; False everything. Defaults to 'output'.
    """
    fold: bool = True
    recompute: float = 0.08
    attention: str | bool = 'exact'
    prompts: str | bool = 'output'

    @classmethod
    def parse(cls, value: bool | Mapping, key: str = 'lean') -> LeanOptions | None:
        """Reads the value of a config key.

        Args:
            value (bool | Mapping): True for the defaults, False for none, or some of the options.
            key (str): The config key, for error messages. Defaults to 'lean'.

        Returns:
            LeanOptions, optional: None for False.

        Raises:
            TypeError, ValueError: The value, or an option in it, is not valid.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, Mapping):
            raise TypeError(f'{key} must be True, False or a dict, got {value!r}')
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ValueError(f'{key} has no option {unknown[0]!r}: expected {", ".join(known)}')
        options = cls(**value)
        if not isinstance(options.fold, bool):
            raise TypeError(f'{key}.fold must be True or False, got {options.fold!r}')
        if not isinstance(options.recompute, (bool, int, float)):
            raise TypeError(f'{key}.recompute must be a number, True or False, '
                            f'got {options.recompute!r}')
        if options.recompute < 0:
            raise ValueError(f'{key}.recompute must not be negative, got {options.recompute}')
        for name, choices in (('attention', ('exact', 'sdpa', False)),
                              ('prompts', ('output', 'bottleneck', 'input', False))):
            chosen = getattr(options, name)
            if chosen is True or chosen not in choices:
                raise ValueError(f'{key}.{name} must be one of {choices}, got {chosen!r}')
        return options

    @property
    def budget(self) -> float:
        """``recompute`` as a number."""
        return float('inf') if self.recompute is True else float(self.recompute)


@dataclass
class LeanReport:
    """What :func:`make_lean` did.

    Attributes:
        covered (dict[str, str]): The stock type of each lean module, by dotted name.
        folded (list[tuple[str, str]]): Names of convolutions and of the norms that went into them.
        recomputed (list[str]): Names of the layers that the backward pass applies again.
        ordinary (dict[str, int]): Bytes kept by each module that is not lean, at the size of the
            dry run.
        kept (int): Bytes kept by the whole network in the dry run.
        channels_last (bool): Whether the network, without a graph, runs channels-last on a CPU.
        remarks (list[str]): What did not go as it should.
    """
    covered: dict[str, str] = field(default_factory=dict)
    folded: list[tuple[str, str]] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)
    ordinary: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    channels_last: bool = False
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f'{len(self.covered)} layers are lean, {len(self.folded)} norms are folded, '
                 f'{len(self.recomputed)} layers are computed again in the backward pass']
        if self.channels_last:
            parts.append('inference on a CPU runs channels-last')
        if self.ordinary and self.kept:
            most = sorted(self.ordinary, key=self.ordinary.get, reverse=True)
            shares = [f'{name or "the network itself"} {self.ordinary[name] / self.kept:.0%}'
                      for name in most[:5]]
            total = sum(self.ordinary.values()) / self.kept
            rest = f' and {len(most) - 5} more' if len(most) > 5 else ''
            parts.append(f'ordinary modules keep {total:.0%} of the bytes that are left: '
                         f'{", ".join(shares)}{rest}')
        return '; '.join(parts + self.remarks)


def make_lean(module: nn.Module,
              lean: bool | Mapping | LeanOptions = True,
              root: nn.Module | None = None,
              key: str = 'lean',
              prompts: nn.Module | None = None) -> LeanReport:
    """Makes the frozen layers of a network lean, in place.

    Runs the network a few times on a small noise image, in eval mode and without touching any
    state, to see which norm follows which convolution and what is worth computing again.

    Args:
        module (nn.Module): The network. Layers with a parameter that trains stay as they are.
        lean (bool | Mapping | LeanOptions): See :class:`LeanOptions`. Defaults to True.
        root (nn.Module, optional): What takes images and runs the network, with whatever trains
            around it. Defaults to None: the network itself.
        key (str): The config key of ``lean``, for error messages. Defaults to 'lean'.
        prompts (nn.Module, optional): Holds prompt blocks that run inside of ``root``; they keep
            less too, and train as before. Blocks of other types, or with norms that keep statistics
            or with dropout, stay as they are. Defaults to None.

    Returns:
        LeanReport: What was done.

    Raises:
        TypeError, ValueError: ``lean`` is not valid.
    """
    options = LeanOptions.parse(lean, key)
    report = LeanReport()
    if options is None:
        return report
    restore(module)
    if prompts is not None and options.prompts:
        _swap_prompts(prompts, options)
    dry_run = DryRun(module if root is None else root, module)
    pairs = find_pairs(module, dry_run) if options.fold and dry_run.shape else []
    _swap(module, options, report)
    if dry_run.shape is None:
        report.remarks.append(f'the network ran at no usual image size ({dry_run.error}), so '
                              'nothing is folded or computed again')
        return report
    if options.fold:
        _fold(module, pairs, dry_run, report)
    if prompts is not None and options.prompts == 'output':
        _check_additions(prompts, dry_run, report)
    report.recomputed = plan(module, options.budget, dry_run)
    counted = kept_bytes(module, dry_run)
    report.kept = sum(counted.values())
    report.ordinary = {path: n for path, n in counted.items()
                       if not isinstance(module.get_submodule(path), twins.Twin)}
    return report


def _check_additions(prompts: nn.Module, dry_run: DryRun, report: LeanReport) -> None:
    """Lets prompts keep their feature where the network changes prompted features in place."""
    with watch_additions() as added:
        outputs = dry_run()
    if outputs is None or all(t._version == version for t, version in added):
        return
    for block in prompts.modules():
        if isinstance(block, twins.PROMPTS):
            block.__dict__['lean_prompts'] = 'bottleneck'
    report.remarks.append('the network changes prompted features in place, so its prompts keep '
                          "the features from before (as with prompts='bottleneck')")


def _swap_prompts(prompts: nn.Module, options: LeanOptions) -> None:
    for block in prompts.modules():
        cls = None if isinstance(block, twins.Twin) else twins.twin_of(block)
        if cls is not None and issubclass(cls, twins.PROMPTS):
            block.__class__ = cls
            block.__dict__['lean_prompts'] = options.prompts


def restore(module: nn.Module) -> None:
    """Makes every lean layer of a network ordinary again, in place.

    Args:
        module (nn.Module): The network.
    """
    for child in module.modules():
        child.__dict__.pop('lean_channels_last', None)
        if isinstance(child, twins.Twin):
            child.__class__ = child.stock_class
            for name in [n for n in vars(child) if n.startswith('lean_')]:
                del child.__dict__[name]


def unfold(module: nn.Module) -> None:
    """Undoes ``fold``, in place: each norm runs by itself, outputs are bitwise the stock ones.

    Args:
        module (nn.Module): The network.
    """
    for child in module.modules():
        for name in ('lean_pair', 'lean_fast', 'lean_channels_last'):
            child.__dict__.pop(name, None)


def store_weights(module: nn.Module,
                  dtype: str,
                  root: nn.Module | None = None,
                  key: str = 'dtype') -> list[str]:
    """Stores the weights of lean convolutions and linear layers in a lower precision, in place.

    A layer computes in the precision of its input: under autocast in autocast's, else with its
    weight converted for the moment.

    Args:
        module (nn.Module): A lean network.
        dtype (str): One of ``STORAGE_DTYPES``.
        root (nn.Module, optional): See :func:`make_lean`. Defaults to None.
        key (str): The config key of ``dtype``, for error messages. Defaults to 'dtype'.

    Returns:
        list[str]: Names of convolutions and linear layers that stay as they are, being trained or
        not lean.

    Raises:
        ValueError: The network does not run with such weights.
    """
    dry_run = DryRun(module if root is None else root, module)
    ran, kept = dry_run.shape is not None, []
    # These compute with the weights of their children, too.
    foreign = {child for parent in module.modules() if isinstance(parent, nn.MultiheadAttention)
               and not isinstance(parent, twins.Twin) for child in parent.modules()}
    for path, layer in module.named_modules():
        if isinstance(layer, twins.STORES_WEIGHTS) and layer not in foreign:
            for parameter in layer.parameters(recurse=False):
                if parameter.is_floating_point() and parameter.element_size() > 2:
                    parameter.data = parameter.data.to(STORAGE_DTYPES[dtype])
        elif isinstance(layer, twins.STOCK_STORES_WEIGHTS):
            kept.append(path)
    if ran and dry_run() is None:
        raise ValueError(f'{key}={dtype!r} does not work with {type(module).__name__}: '
                         f'{dry_run.error}')
    return kept


# --- which layers -----------------------------------------------------------------------------


def _swap(module: nn.Module, options: LeanOptions, report: LeanReport) -> None:
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    for path, child in list(module.named_modules()):
        cls = twins.twin_of(child)
        if cls is None or issubclass(cls, twins.PROMPTS):
            continue
        # Attention modules compute with their children's parameters too.
        of_attention = issubclass(cls, twins.ATTENTION)
        if any(p.requires_grad for p in child.parameters(recurse=of_attention)):
            continue
        if of_attention and not options.attention:
            continue
        report.covered[path] = type(child).__name__
        child.__class__ = cls
        child.__dict__['lean_owner'] = path
        if of_attention and hasattr(cls, 'lean_sdpa'):
            child.__dict__['lean_sdpa'] = options.attention == 'sdpa'
            child.__dict__['lean_drops_weights'] = (
                child in parents and twins.forward_name(parents[child]) in twins.DROPS_WEIGHTS)


def _fold(module: nn.Module, pairs: list[tuple[nn.Module, nn.Module]], dry_run: DryRun,
          report: LeanReport) -> None:
    places = {child: (parent, name) for parent in module.modules()
              for name, child in parent.named_children()}
    pairs = [twins.Pair(conv, norm, *places[norm], module) for conv, norm in pairs
             if isinstance(conv, twins.Twin) and isinstance(norm, twins.Twin)]
    in_maps, expected = share_in_maps(module, dry_run)
    error = fold(pairs, dry_run, expected)
    if error is None:
        report.folded = [(p.conv.lean_owner, p.norm.lean_owner) for p in pairs]
        # Transformers gain nothing from it.
        report.channels_last = in_maps >= 0.5 and set_channels_last(module, dry_run, expected)
    else:
        report.remarks.append(f'folding moved outputs by {error:.1e}, so nothing is folded '
                              '(as with fold=False)')
