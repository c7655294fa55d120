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
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from .base import stand_in
from .graph import FrozenLayerError, is_recorded
from .memory import CountedAs
from .precision import Precision, without_autocast

aten = torch.ops.aten


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
    feature the network changes in place.

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
        if saves == 'output' and sums and all(y._version == version for y, version in sums):
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


# --- dropout ----------------------------------------------------------------------------------


def _dropouts(block: nn.Module) -> list[nn.Module]:
    return [m for m in block.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]


def _drops(block: nn.Module) -> bool:
    return any(m.training and m.p > 0 for m in _dropouts(block))


def _as_now(block: nn.Module) -> nn.Module:
    """The block as it is, also once its mode is another one."""
    return stand_in(block, {}) if _dropouts(block) else block


class _Draws:
    """The random numbers that a block with dropout is about to draw; a call, as a context, has them
    drawn again.

    Args:
        block (nn.Module): The block.
        x (Tensor): What it is given, on the device that it draws on.
    """

    def __init__(self, block: nn.Module, x: Tensor) -> None:
        self.state = None
        if _drops(block):
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
    if block.lean.saves == 'input':
        return CountedAs(block, partial(_again, block, lambda b, x: b.up(b.down(x))))(feature)
    # A convolution keeps its input only, which is all that could be kept.
    down = block.down if block.lean.first else partial(_again, block, lambda b, x: b.down(x))
    return CountedAs(block, lambda x: _again(block, lambda b, h: b.up(h), down(x)))(feature)


def _again(block: nn.Module, method: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a method whose backward pass applies it again, with the parameters of now."""
    named = dict(block.named_parameters(remove_duplicate=False))
    block = _as_now(block)

    def compute(x: Tensor, *parameters: Tensor) -> Tensor:
        return method(stand_in(block, dict(zip(named, parameters))), x)

    return checkpoint(compute, x, *named.values(), use_reentrant=False,
                      preserve_rng_state=_drops(block))


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
        return CountedAs(block, _Addition(block, to_map, from_map, note))(x)
    feature = to_map(x)
    prompt = prompt_of(block, feature)
    if note is not None:
        note(prompt, feature)
    y = x + from_map(prompt)
    if not _is_plain(block) and block.lean.observer is not None:
        block.lean.observer(y)
    return y


class _Addition:
    r"""Computes :math:`\hat x = x + P(x)`.

    Keeps :math:`\hat x`, which the layers behind keep anyway, and the narrow tensor. The backward
    pass computes :math:`P(x)` again from the latter, and takes :math:`x = \hat x - P(x)`, which is
    exact up to the rounding of the sum, for the gradients of ``down``: those of a convolution where
    that is all of it, else by computing it again, too.

    Args:
        block, to_map, from_map, note: See :func:`add_prompt`.
    """

    def __init__(self, block: nn.Module, to_map: Callable[[Tensor], Tensor],
                 from_map: Callable[[Tensor], Tensor],
                 note: Callable[[Tensor, Tensor], None] | None) -> None:
        self.block, self.to_map, self.from_map, self.note = _as_now(block), to_map, from_map, note
        first = block.lean.first
        self.conv = self.block.get_submodule(first) if first else None
        self.parameters = {n: p for n, p in block.named_parameters(remove_duplicate=False)
                           if not first or not n.startswith(f'{first}.')}

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x)[0]
        own = (None, None) if self.conv is None else (self.conv.weight, self.conv.bias)
        return _Add.apply(x, self, *own, *self.parameters.values())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prompted feature and the narrow tensor, without a graph."""
        feature = self.to_map(x)
        self._down_draws = _Draws(self.block, feature)
        hidden = self.block.down(feature)
        self._up_draws = _Draws(self.block, hidden)
        prompt = self.block.up(hidden)
        if self.note is not None:
            self.note(prompt, feature)
        return _combine(torch.add, x, self.from_map(prompt)), hidden

    def down(self, feature: Tensor, parameters: list[Tensor]) -> Tensor:
        """The narrow tensor once more, computed with other parameters."""
        with self._down_draws():
            return self._with(parameters).down(feature)

    def up(self, hidden: Tensor, parameters: list[Tensor]) -> Tensor:
        """The prompt once more, in the layout of the feature, likewise."""
        with self._up_draws():
            return self.from_map(self._with(parameters).up(hidden))

    def _with(self, parameters: list[Tensor]) -> nn.Module:
        return stand_in(self.block, dict(zip(self.parameters, parameters)))


def _combine(function: Callable, x: Tensor, prompt: Tensor) -> Tensor:
    """``function(x, prompt)``, in the memory of the prompt where the result fits there."""
    fits = (prompt.dtype == x.dtype and prompt.stride() == x.stride() and not prompt._is_view())
    return function(x, prompt, out=prompt) if fits else function(x, prompt)


class _Add(Function):

    @staticmethod
    def forward(ctx, x, addition, weight, bias, *parameters):
        y, hidden = addition.forward(x)
        ctx.addition, ctx.precision, ctx.dtype = addition, Precision(x.device), x.dtype
        ctx.save_for_backward(y, hidden, weight, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        try:
            y, hidden, weight, *parameters = ctx.saved_tensors
        except RuntimeError as error:
            if 'modified by an inplace operation' not in str(error):
                raise
            raise FrozenLayerError(
                'a prompted feature, or a parameter of its prompt block, was changed in place '
                'between the forward and the backward pass; if some layer does so on purpose, set '
                "model.backbone.lean=dict(prompts='bottleneck'), which keeps the feature from "
                f'before the prompt was added ({error})') from error
        addition = ctx.addition
        wants_x, _, _, _, *wants = ctx.needs_input_grad
        # Stand-ins: the parameters' own hooks run once, when autograd gets to the parameters, and
        # the values are those of the forward pass, whatever the block holds now.
        own = [p.detach().requires_grad_(wanted) for p, wanted in zip(parameters, wants)]
        trained = [p for p in own if p.requires_grad]
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), ctx.precision():
            # A view: PyTorch's counters of operations hook what modules read, and fail on a leaf.
            prompt = addition.up(hidden.view_as(hidden), own)
        inner, *found = torch.autograd.grad(
            prompt, (hidden, *trained), grad.to(prompt.dtype), allow_unused=True)
        weight_grad = bias_grad = None
        with without_autocast(grad):
            x = addition.to_map(_combine(torch.sub, y, prompt.detach()))
        if addition.conv is not None:
            with without_autocast(grad):
                outer, weight_grad, bias_grad = _convolution_backward(
                    addition.conv, inner, x, weight, ctx.needs_input_grad)
        else:
            x = x.detach().requires_grad_()
            with torch.enable_grad(), ctx.precision():
                again = addition.down(x.view_as(x), own)
            outer, *more = torch.autograd.grad(again, (x, *trained), inner, allow_unused=True)
            found = [a if b is None else b if a is None else a + b for a, b in zip(found, more)]
        if wants_x:
            with without_autocast(grad):
                outer = addition.from_map(outer).to(ctx.dtype) + grad.to(ctx.dtype)
        found = iter(found)
        return (outer if wants_x else None, None, weight_grad, bias_grad,
                *(next(found) if wanted else None for wanted in wants))


def _convolution_backward(conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor,
                          wants: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of a convolution's input, weight and bias, those of the parameters in their dtype.

    Args:
        conv (nn.Conv2d): The convolution.
        grad (Tensor): Gradient of its output.
        x (Tensor): Its input.
        weight (Tensor): Its weight, as it was.
        wants (tuple[bool, ...]): Of input, anything, weight and bias.
    """
    wants_x, _, *wants_own = wants[:4]
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    outer, *own = aten.convolution_backward(
        grad, x.to(grad.dtype), weight.to(grad.dtype), [weight.size(0)], conv.stride, padding,
        conv.dilation, False, [0, 0], conv.groups, [wants_x, *wants_own])
    return outer, *(g.to(weight.dtype) if wanted else None for g, wanted in zip(own, wants_own))
