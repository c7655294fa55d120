"""Freezes the parameters of a module, and keeps what is frozen in eval mode.

Nothing here knows the hosts: any ``nn.Module`` can be frozen.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from mmprotune.errors import DoesNotFit, OptionError


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers that the module itself owns."""
    own = [(n, p) for n, p in module._parameters.items() if p is not None]
    own += [(n, b) for n, b in module._buffers.items()
            if b is not None and n not in module._non_persistent_buffers_set]
    return own


def freeze(module: nn.Module,
           keep: Iterable[str] = (),
           trainable: Iterable[str] = (),
           fixed: Iterable[str] = (),
           key: str = 'trainable') -> set[str]:
    """Sets ``requires_grad`` of every parameter of ``module``, and says which tensors are frozen.

    Args:
        module (nn.Module): Module to freeze.
        keep (Iterable[str]): Names of parameters that stay trainable.
        trainable (Iterable[str]): Regular expressions; a parameter stays trainable too when one
            of them matches its whole dotted name (``re.fullmatch``).
        fixed (Iterable[str]): Names of parameters that the module itself keeps from training; none
            of them trains. One in ``keep`` is not counted as frozen either.
        key (str): Name of the config key that ``trainable`` came from, for error messages.

    Returns:
        set[str]: Dotted names of the frozen parameters, and of the buffers in modules that do not
        train.

    Raises:
        ValueError: A regular expression is malformed, or matches no parameter that can train.
    """
    names = [name for name, _ in module.named_parameters()]
    keep, fixed = set(keep), set(fixed)
    for pattern in trainable:
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise OptionError(f'{key}: {pattern!r} is not a regular expression: {error}') from None
        matched = [name for name in names if compiled.fullmatch(name)]
        if not matched:
            raise OptionError(f'{key}: {pattern!r} matches no parameter; '
                              f'the names begin with {", ".join(names[:3])}, …')
        if fixed.issuperset(matched):
            raise OptionError(f'{key}: {pattern!r} matches only parameters that the backbone '
                              f'itself keeps from training (requires_grad=False): {matched[0]}, …')
        keep.update(name for name in matched if name not in fixed)
    frozen = set()
    # Every name of a tensor that modules share: the state dict has it under each.
    parameters = list(module.named_parameters(remove_duplicate=False))
    kept = {id(param) for name, param in parameters if name in keep}
    for name, param in parameters:
        param.requires_grad_(id(param) in kept and name not in fixed)
        if id(param) not in kept:
            frozen.add(name)
    live = {path for path, _ in live_modules(module)}
    for path, child in module.named_modules(remove_duplicate=False):
        if path not in live:
            frozen.update(
                (f'{path}.' if path else '') + n for n, _ in own_tensors(child)
                if n in child._buffers)
    return frozen


def live_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that follow ``train()``: those whose parameters all train, those that own a
    trainable parameter, and parameter-free ones directly inside a module of the first kind."""
    live = []

    def visit(path: str, current: nn.Module, parent_trains: bool) -> None:
        params = list(current.parameters())
        trains = all(p.requires_grad for p in params) if params else parent_trains
        owns = any(p is not None and p.requires_grad for p in current._parameters.values())
        if trains or owns:
            live.append((path, current))
        for name, child in current.named_children():
            visit(f'{path}.{name}' if path else name, child, trains)

    visit('', module, False)
    return live


def keep_frozen_in_eval(module: nn.Module) -> None:
    """Puts every frozen submodule into eval mode: BatchNorm statistics, dropout and drop path
    stand still. Submodules that train keep the mode they have.

    Args:
        module (nn.Module): A module that :func:`freeze` has been applied to.
    """
    live = {id(m) for _, m in live_modules(module)}

    def visit(current: nn.Module) -> None:
        if not any(id(m) in live for m in current.modules()):
            # Not the flag alone: some layers prepare for eval mode here (LeViT's attention).
            current.train(False)
            return
        if id(current) not in live:
            current.training = False
        for child in current.children():
            visit(child)

    visit(module)


def apply_to_the_rest(module: nn.Module, fn: Callable[[nn.Module], None],
                      names: Iterable[str]) -> None:
    """``module.apply(fn)``, except that frozen tensors keep their values.

    Args:
        module (nn.Module): The module.
        fn (Callable): Called with every submodule, children first.
        names (Iterable[str]): Dotted names of the frozen parameters and buffers.
    """
    frozen = {id(t) for t in frozen_tensors(module, names).values()}

    def visit(current: nn.Module) -> None:
        for child in current.children():
            visit(child)
        if any(b is not None and b.dtype == torch.int8 for b in current._buffers.values()):
            return  # weights in 8 bits are frozen, and nobody draws such numbers
        # One module's at a time: a copy of the whole network would not be small.
        saved = [(t, t.detach().clone()) for _, t in own_tensors(current) if id(t) in frozen]
        fn(current)
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)

    visit(module)


def frozen_tensors(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The parameters and buffers of ``module`` with the given dotted names.

    Args:
        module (nn.Module): Module that owns them.
        names (Iterable[str]): Dotted names.

    Returns:
        dict[str, Tensor]: The tensors themselves, by name.
    """
    wanted = set(names)
    found = {n: p for n, p in module.named_parameters(remove_duplicate=False) if n in wanted}
    found.update((n, b) for n, b in module.named_buffers(remove_duplicate=False) if n in wanted)
    return found


def adopt(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts other tensors in the place of a module's own, whose memory is given back.

    They stay in their storage. The parameters around them are the module's, so that whoever sets
    ``requires_grad`` or ``data`` of one does so for this module only.

    Args:
        module (nn.Module): The module; as it was where an error is raised.
        tensors (Mapping[str, Tensor]): By dotted name of a parameter or persistent buffer.

    Raises:
        DoesNotFit: The module has no such tensor, or one of another shape.
    """
    places = {f'{path}.{name}' if path else name: (owner, name, tensor)
              for path, owner in module.named_modules(remove_duplicate=False)
              for name, tensor in own_tensors(owner)}
    for name, tensor in tensors.items():
        if name not in places or places[name][2].shape != tensor.shape:
            there = tuple(places[name][2].shape) if name in places else 'nothing of that name'
            raise DoesNotFit(f'{type(module).__name__} has {there} for {name}, expected '
                             f'{tuple(tensor.shape)}')
    made: dict[int, Tensor] = {}  # what modules share stays shared
    for name, tensor in tensors.items():
        owner, key, own = places[name]
        if id(own) not in made:
            made[id(own)] = tensor.detach() if key in owner._buffers else nn.Parameter(
                tensor.detach(), requires_grad=False)
        (owner._buffers if key in owner._buffers else owner._parameters)[key] = made[id(own)]
