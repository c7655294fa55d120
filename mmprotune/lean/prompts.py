"""What prompt blocks save for the backward pass, which computes the rest again.

A block takes part that has the two halves of its ``forward``, methods ``down``, from a feature map
to a narrow hidden one, and ``up``, from that to the prompt: ``forward(x)`` is ``up(down(x))``. It
trains as before. What hooks on it or in it see is computed once, so that a block with hooks is an
ordinary one; so is a block with dropout or with norms that keep statistics.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .dry_run import DryRun
from .graph import FrozenLayerError, is_recorded
from .layers import stand_in
from .memory import CountedAs
from .precision import Precision, without_autocast

aten = torch.ops.aten


class PromptState:
    """What a prompt block saves. Lies in the block's ``__dict__``, out of the state dict.

    Attributes:
        saves (str): See ``prompts`` of :class:`~mmprotune.lean.options.LeanOptions`.
        first (str): The name of the 1x1 convolution that is all of ``down``; empty for any other.
        observer (Callable, optional): Takes the feature map and the prompted feature of each call
            of :func:`add_prompt` during a dry run.
    """
    __slots__ = ('saves', 'first', 'observer')

    def __init__(self, saves: str) -> None:
        self.saves, self.first, self.observer = saves, '', None


def set_saved(prompts: nn.Module, saves: str, dry_run: DryRun) -> None:
    """Sets what prompt blocks save.

    'output' becomes 'bottleneck' for blocks whose ``down`` is more than a 1x1 convolution, and for
    those whose prompted feature the network changes in place.

    Args:
        prompts (nn.Module): Holds the blocks.
        saves (str): See ``prompts`` of :class:`~mmprotune.lean.options.LeanOptions`.
        dry_run (DryRun): Runs the network with its prompts.

    """
    blocks = [block for block in prompts.modules() if _has_halves(block)]
    added: dict[nn.Module, list[tuple[Tensor, int]]] = {}

    def observe(block: nn.Module, feature: Tensor, y: Tensor) -> None:
        added.setdefault(block, []).append((y, y._version))
        block.lean.first = _first_convolution(block, feature)

    for block in blocks:
        block.__dict__['lean'] = state = PromptState('bottleneck' if saves == 'output' else saves)
        state.observer = partial(observe, block)
    ran = saves == 'output' and dry_run.shape is not None and dry_run() is not None
    for block in blocks:
        block.lean.observer = None
        if ran and block.lean.first and all(
                y._version == version for y, version in added.get(block, ())):
            block.lean.saves = 'output'


def _has_halves(block: nn.Module) -> bool:
    """Whether ``forward`` is known to be ``up`` after ``down``, and may run twice."""
    owners = [next((i for i, cls in enumerate(type(block).__mro__) if name in vars(cls)), None)
              for name in ('forward', 'down', 'up')]
    # A subclass with a `forward` of its own computes something else than the halves it inherits.
    if None in owners or owners[0] < max(owners[1:]) or 'forward' in block.__dict__:
        return False
    # Statistics of a norm must not be updated twice, random numbers not be drawn twice.
    stateful = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return not any(isinstance(m, stateful) for m in block.modules())


def _first_convolution(block: nn.Module, feature: Tensor) -> str:
    """The name of the 1x1 convolution that is all of ``down``; empty where it is something else."""
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
    plain = (type(conv) is nn.Conv2d and conv.kernel_size == conv.stride == (1, 1)
             and conv.padding in ((0, 0), 'same', 'valid') and conv.groups == 1
             and args and args[0] is feature and y is hidden and y._version == version)
    return names[conv] if plain else ''


def _is_plain(block: nn.Module) -> bool:
    """Whether the block has to run as it is now."""
    return is_recorded() or not isinstance(block.__dict__.get('lean'), PromptState) or any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
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
    if block.lean.saves == 'input':
        return CountedAs(block, partial(_again, block, lambda b, x: b.up(b.down(x))))(feature)
    return CountedAs(block, lambda x: _again(block, lambda b, h: b.up(h), block.down(x)))(feature)


def _again(block: nn.Module, method: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a method whose backward pass applies it again, with the parameters of now."""
    named = dict(block.named_parameters(remove_duplicate=False))

    def compute(x: Tensor, *parameters: Tensor) -> Tensor:
        return method(stand_in(block, dict(zip(named, parameters))), x)

    return checkpoint(compute, x, *named.values(), use_reentrant=False, preserve_rng_state=False)


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
        block.lean.observer(feature, y)
    return y


class _Addition:
    r"""Computes :math:`\hat x = x + P(x)` where :math:`P` starts with a 1x1 convolution.

    Keeps :math:`\hat x`, which the layers behind keep anyway, and the narrow output of that
    convolution. The backward pass computes :math:`P(x)` again from the latter, and takes
    :math:`x = \hat x - P(x)`, which is exact up to the rounding of the sum, for the gradient of the
    convolution's weight.

    Args:
        block, to_map, from_map, note: See :func:`add_prompt`.
    """

    def __init__(self, block: nn.Module, to_map: Callable[[Tensor], Tensor],
                 from_map: Callable[[Tensor], Tensor],
                 note: Callable[[Tensor, Tensor], None] | None) -> None:
        self.block, self.to_map, self.from_map, self.note = block, to_map, from_map, note
        first = f'{block.lean.first}.'
        self.up_parameters = {n: p for n, p in block.named_parameters(remove_duplicate=False)
                              if not n.startswith(first)}

    def __call__(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.forward(x)[0]
        conv = self.block.get_submodule(self.block.lean.first)
        return _Add.apply(x, self, conv.weight, conv.bias, *self.up_parameters.values())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prompted feature and the narrow tensor, without a graph."""
        feature = self.to_map(x)
        hidden = self.block.down(feature)
        prompt = self.block.up(hidden)
        if self.note is not None:
            self.note(prompt, feature)
        return _combine(torch.add, x, self.from_map(prompt)), hidden

    def up(self, hidden: Tensor, parameters: list[Tensor]) -> Tensor:
        """The prompt, in the layout of the feature, computed with other parameters."""
        block = stand_in(self.block, dict(zip(self.up_parameters, parameters)))
        return self.from_map(block.up(hidden))


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
        wants_x, _, wants_weight, wants_bias, *wants = ctx.needs_input_grad
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
        found = iter(found)
        gradients = [next(found) if wanted else None for wanted in wants]
        with without_autocast(grad):
            x = addition.to_map(_combine(torch.sub, y, prompt.detach())).to(inner.dtype)
            outer, weight_grad, bias_grad = aten.convolution_backward(
                inner, x, weight.to(inner.dtype), [weight.size(0)], [1, 1], [0, 0], [1, 1], False,
                [0, 0], 1, [wants_x, wants_weight, wants_bias])
            if wants_x:
                outer = addition.from_map(outer).to(ctx.dtype) + grad.to(ctx.dtype)
            if wants_weight:
                weight_grad = weight_grad.to(weight.dtype)
            if wants_bias:
                bias_grad = bias_grad.to(weight.dtype)
        return outer, None, weight_grad, bias_grad, *gradients
