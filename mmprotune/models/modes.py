"""Which parts of a frozen backbone are told that it trains.

Frozen layers stay in eval mode. Some backbones return more in training, though: features for
auxiliary heads, or the same image in several branches. What decides about that has to know.
"""
from __future__ import annotations

import contextlib
from types import CodeType

import torch
from torch import nn

from mmprotune.lean.dry_run import image_shapes, noise, tensors_in, undisturbed

from . import calls
from .trace import BATCH, Trace


def modules_with_mode(owner: nn.Module, trace: Trace | None = None) -> frozenset[str]:
    """Finds the modules that have to follow ``train()`` although they are frozen: in training the
    backbone returns other tensors, in number or in shape, because of them.

    That is the backbone itself, or else layers of it (TridentNet's) whose own ``forward`` asks for
    the mode. Layers that only compute otherwise in training (dropout, a norm, RevViT's backward
    pass) are none of them.

    Args:
        owner (nn.Module): The prompted backbone around it.
        trace (Trace, optional): A dry run of ``owner.backbone`` in eval mode without prompts, which
            saves one. Defaults to None.

    Returns:
        frozenset[str]: Dotted names in ``owner.backbone``; '' for the backbone itself.
    """
    shapes = image_shapes(owner.backbone) if trace is None else [trace.shape]
    plain = None if trace is None else [trace.shape, *(tuple(t.shape) for t in trace.outputs)]
    forward = getattr(type(owner.backbone).forward, '__code__', None)
    if 'training' in getattr(forward, 'co_names', ()):
        plain = plain or _returned(owner, frozenset(), shapes)
        wanted = _returned(owner, frozenset(['']), shapes)
        if None not in (plain, wanted) and len(plain) != len(wanted):
            return frozenset([''])
    kinds: dict[type, set[str]] = {}
    for path, module in owner.backbone.named_modules():
        # Layers without weights (drop path) draw at random, and no more.
        if path and any(True for _ in module.parameters()) and _asks_for_mode(module):
            kinds.setdefault(type(module), set()).add(path)
    told = frozenset().union(*kinds.values())
    if not told:
        return told
    plain, wanted = plain or _returned(owner, frozenset(), shapes), _returned(owner, told, shapes)
    # Of images of the same shape, or they say nothing.
    if None in (plain, wanted) or plain[0] != wanted[0] or plain == wanted:
        return frozenset()
    for paths in kinds.values():  # those that it does not depend on stay in eval mode
        if _returned(owner, told - paths, shapes) == wanted:
            told -= paths
    return told


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether the ``forward`` of a host's class, or a function in it, reads the mode. PyTorch's and
    MMCV's layers return one tensor of the same shape in both."""
    if type(module).__module__.partition('.')[0] in ('torch', 'mmcv'):
        return False
    codes = [getattr(type(module).forward, '__code__', None)]
    for code in codes:
        if isinstance(code, CodeType):
            if 'training' in code.co_names:
                return True
            codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    return False


def _returned(owner: nn.Module, told: frozenset[str],
              shapes: list[tuple[int, int, int]]) -> list[tuple[int, ...]] | None:
    """The first shape of an image at which the backbone runs without prompts while the modules
    ``told`` are in training mode, then those of what it returns; None where there is none."""
    backbone = owner.backbone
    with undisturbed(owner), torch.no_grad():
        for path in told:
            backbone.get_submodule(path).training = True
        for shape in shapes:
            with contextlib.suppress(Exception), \
                    calls.opened(owner, calls.Call(shape[1:], plain=True)):
                outputs = backbone(noise(backbone, shape, BATCH))
                return [shape, *(tuple(t.shape) for t in tensors_in(outputs))]
    return None
