"""What prompt blocks save for the backward pass, which computes the rest again.

A block takes part that has the two halves of its ``forward``, methods ``down``, from a feature map
to a narrow hidden one, and ``up``, from that to the prompt: ``forward(x)`` is ``up(down(x))``. It
trains as before, dropping out the same elements again. What hooks on it or in it see is computed
once, so that a block with hooks is an ordinary one; so is one with norms that keep statistics.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .addition import Addition
from .base import stand_in
from .dropout import as_now, drops
from .graph import is_recorded
from .memory import CountedAs


class PromptState:
    """What a prompt block saves. Lies in the block's ``__dict__``, out of the state dict.

    Attributes:
        saves (str): See ``prompts`` of :class:`~mmprotune.lean.options.LeanOptions`.
        first (str): The name of the convolution that is all of ``down``; empty for any other.
        observer (Callable, optional): Takes the prompted feature of each call of
            :func:`add_prompt` during a dry run.
    """
    __slots__ = ('saves', 'first', 'observer')

    def __init__(self, saves: str) -> None:
        self.saves, self.first, self.observer = saves, '', None


@contextlib.contextmanager
def observed(prompts: nn.Module, saves: str) -> Iterator[dict]:
    """Sets what prompt blocks save, by a run of their network in a graph while this is open.

    'output' becomes 'bottleneck' for blocks whose prompt is not added, and for those whose prompted
    feature the network changes in place; both become 'input' for blocks that change their hidden
    map in place, or return it.

    Args:
        prompts (nn.Module): Holds the blocks.
        saves (str): See ``prompts`` of :class:`~mmprotune.lean.options.LeanOptions`.

    Yields:
        dict: What the run showed; without it 'output' becomes 'bottleneck', too.
    """
    blocks = [block for block in prompts.modules() if _has_halves(block)]
    added: dict[nn.Module, list[tuple[Tensor, int]]] = {}
    for block in blocks:
        block.__dict__['lean'] = state = PromptState('bottleneck' if saves == 'output' else saves)
        state.observer = lambda y, block=block: added.setdefault(block, []).append((y, y._version))
    yield added
    for block in blocks:
        block.lean.observer = None
        sums = added.get(block)
        if (saves == 'output' and block.lean.saves == 'bottleneck' and sums
                and all(y._version == version for y, version in sums)):
            block.lean.saves = 'output'


def _has_halves(block: nn.Module) -> bool:
    """Whether ``forward`` is known to be ``up`` after ``down``, and may run twice."""
    owners = [next((i for i, cls in enumerate(type(block).__mro__) if name in vars(cls)), None)
              for name in ('forward', 'down', 'up')]
    # A subclass with a `forward` of its own computes something else than the halves it inherits.
    if None in owners or owners[0] < max(owners[1:]) or 'forward' in block.__dict__:
        return False
    # Statistics of a norm must not be updated twice.
    return not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in block.modules())


def _first_convolution(block: nn.Module, feature: Tensor) -> str:
    """The name of the convolution that is all of ``down``; empty where it is something else."""
    called = []
    names = {m: name for name, m in block.named_modules() if m is not block}
    handles = [m.register_forward_hook(lambda m, args, y: called.append((m, args, y, y._version)))
               for m in names]
    try:
        with torch.no_grad():
            hidden = block.down(feature)
    finally:
        for handle in handles:
            handle.remove()
    if len(called) != 1:
        return ''
    conv, args, y, version = called[0]
    plain = (type(conv) is nn.Conv2d and conv.padding_mode == 'zeros' and conv.padding != 'same'
             and args and args[0] is feature and y is hidden and y._version == version)
    return names[conv] if plain else ''


def _reads_hidden(block: nn.Module, feature: Tensor) -> bool:
    """Whether ``up`` leaves the hidden map as it is, and returns another one."""
    with torch.no_grad():
        hidden = block.down(feature)
        version = hidden._version
        prompt = block.up(hidden)
    return hidden._version == version and prompt is not hidden


# --- running a block --------------------------------------------------------------------------


def _is_plain(block: nn.Module) -> bool:
    """Whether the block has to run as it is now."""
    return is_recorded() or not isinstance(block.__dict__.get('lean'), PromptState) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        # FullyShardedDataParallel puts views of a parameter of its own in place of a module's.
        or any(isinstance(value, Tensor) for value in m.__dict__.values())
        for m in block.modules())


def prompt_of(block: nn.Module, feature: Tensor) -> Tensor:
    """The prompt of a feature map.

    Args:
        block (nn.Module): The prompt block.
        feature (Tensor): Feature map of shape (N, C, H, W).

    Returns:
        Tensor: Prompt of shape (N, C, H, W).
    """
    if not torch.is_grad_enabled() or _is_plain(block):
        return block(feature)
    if block.lean.observer is not None:
        block.lean.first = _first_convolution(block, feature)
        if not _reads_hidden(block, feature):
            block.lean.saves = 'input'
    if block.lean.saves == 'input':
        return CountedAs(block, partial(_again, block, lambda b, x: b.up(b.down(x))))(feature)
    # A convolution keeps its input only, which is all that could be kept.
    down = block.down if block.lean.first else partial(_again, block, lambda b, x: b.down(x))
    return CountedAs(block, lambda x: _again(block, lambda b, h: b.up(h), down(x)))(feature)


def _again(block: nn.Module, method: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a method whose backward pass applies it again, with the parameters of now."""
    named = dict(block.named_parameters(remove_duplicate=False))
    block = as_now(block)

    def compute(x: Tensor, *parameters: Tensor) -> Tensor:
        return method(stand_in(block, dict(zip(named, parameters))), x)

    return checkpoint(compute, x, *named.values(), use_reentrant=False,
                      preserve_rng_state=drops(block))


def add_prompt(block: nn.Module,
               x: Tensor,
               to_map: Callable[[Tensor], Tensor],
               from_map: Callable[[Tensor], Tensor],
               note: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
    """Adds the prompt of a feature to it.

    Args:
        block (nn.Module): The prompt block.
        x (Tensor): The feature, as its stage returns it.
        to_map (Callable): From the feature to (N, C, H, W).
        from_map (Callable): The way back for the prompt. Both are linear and move elements only.
        note (Callable, optional): Called with prompt and feature map. Defaults to None.

    Returns:
        Tensor: The prompted feature, as the feature.
    """
    if not _is_plain(block) and block.lean.saves == 'output':
        return CountedAs(block, Addition(block, to_map, from_map, note))(x)
    feature = to_map(x)
    prompt = prompt_of(block, feature)
    if note is not None:
        note(prompt, feature)
    y = x + from_map(prompt)
    if not _is_plain(block) and block.lean.observer is not None:
        block.lean.observer(y)
    return y
