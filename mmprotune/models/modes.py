"""Which parts of a frozen backbone are told that it trains.

Frozen layers stay in eval mode. Some backbones return more in training, though: features for
auxiliary heads, or the same image in several branches. What decides about that has to know; so has
drop path, where a config asks for it.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import CodeType

import torch
from torch import nn

from mmprotune.errors import OptionError
from mmprotune.lean.dry_run import image_shapes, noise, tensors_in, undisturbed

from . import calls
from .trace import BATCH, Trace

# What classes are called that drop whole branches at random.
DROP_PATHS = ('DropPath', 'StochasticDepth')


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
    forward = getattr(type(owner.backbone).forward, '__code__', None)
    if 'training' in getattr(forward, 'co_names', ()):
        _, plain, wanted = _both(owner, frozenset(['']), trace)
        if len(plain) != len(wanted):
            return frozenset([''])
    kinds: dict[type, set[str]] = {}
    for path, module in owner.backbone.named_modules():
        # Layers without weights (drop path) draw at random, and no more.
        if path and any(True for _ in module.parameters()) and _asks_for_mode(module):
            kinds.setdefault(type(module), set()).add(path)
    told = frozenset().union(*kinds.values())
    if not told:
        return told
    shape, plain, wanted = _both(owner, told, trace)
    if plain == wanted:
        return frozenset()
    for paths in kinds.values():  # those that it does not depend on stay in eval mode
        if _returned(owner, told - paths, shape) == wanted:
            told -= paths
    return told


def drop_paths(backbone: nn.Module) -> frozenset[str]:
    """Finds the layers that drop whole branches at random in training, mmcv's, timm's and
    torchvision's.

    Args:
        backbone (nn.Module): The backbone.

    Returns:
        frozenset[str]: Dotted names of those that drop any.

    Raises:
        ValueError: There is none.
    """
    found = frozenset(
        path for path, module in backbone.named_modules()
        if type(module).__name__.endswith(DROP_PATHS) and
        getattr(module, 'drop_prob', getattr(module, 'p', None)) != 0)
    if not found:
        raise OptionError(f'drop_path=True, but {type(backbone).__name__} has no drop path, or all '
                          'of it at a rate of 0; model.backbone.backbone.drop_path_rate sets it in '
                          'most backbones that have it')
    return found


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


def _both(owner: nn.Module, told: frozenset[str], trace: Trace | None) -> tuple:
    """The first shape of an image at which the backbone runs while the modules ``told`` are in
    training mode and while none is, and the shapes of what it returns in eval mode and then; no
    outputs where there is no such shape."""
    known = {} if trace is None else {trace.shape: [tuple(t.shape) for t in trace.outputs]}
    for shape in dict.fromkeys((*known, *image_shapes(owner.backbone))):
        wanted = _returned(owner, told, shape)
        if wanted is not None:
            plain = known.get(shape) or _returned(owner, frozenset(), shape)
            if plain is not None:
                return shape, plain, wanted
    return None, [], []


def _returned(owner: nn.Module, told: frozenset[str],
              shape: tuple[int, int, int]) -> list[tuple[int, ...]] | None:
    """Shapes of what the backbone returns without prompts for an image, while the modules ``told``
    are in training mode; None where it does not run."""
    backbone = owner.backbone
    with undisturbed(owner), _same_buffers(backbone), torch.no_grad(), \
            contextlib.suppress(Exception), calls.opened(owner, calls.Call(shape[1:], plain=True)):
        for path in told:
            backbone.get_submodule(path).training = True
        return [tuple(t.shape) for t in tensors_in(backbone(noise(backbone, shape, BATCH)))]
    return None


@contextlib.contextmanager
def _same_buffers(network: nn.Module) -> Iterator[None]:
    """Afterwards a network's buffers are what they were: norms that are told the mode (timm's, with
    an activation) count what they see."""
    before = [(module, name, tensor, tensor.clone()) for module in network.modules()
              for name, tensor in module._buffers.items() if tensor is not None]
    try:
        yield
    finally:
        for module, name, tensor, value in before:
            module._buffers[name] = tensor
            if not torch.equal(tensor, value):
                tensor.copy_(value)
