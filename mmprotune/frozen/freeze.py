"""Freezing as a guarantee: freeze, keep in eval mode, and audit.

Nothing here knows the hosts: any ``nn.Module`` can be frozen.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mmprotune.errors import FrozenTensorsChanged

from .fingerprint import OPTIONAL_BUFFERS, digest_tensors, fingerprint, identity

__all__ = [
    'OPTIONAL_BUFFERS', 'FillRecorder', 'FrozenSnapshot', 'FrozenTensorsChanged',
    'apply_to_the_rest', 'audit', 'freeze', 'frozen_tensors', 'keep_frozen_in_eval'
]


class FillRecorder:
    """Records which parameters and buffers state dicts fill while the context is open.

    Works for every way of loading: PyTorch's ``load_state_dict``, MMEngine's, and what backbones do
    with either in their constructor (timm's) or in ``init_weights``. All of them end in
    ``nn.Module._load_from_state_dict``, which is watched meanwhile; nothing else would see loads of
    modules that are only being built.

    Attributes:
        file_shapes (dict[str, tuple]): Keys and shapes of the longest state dict that came, in its
            order.
    """

    def __init__(self) -> None:
        self.file_shapes: dict[str, tuple[int, ...]] = {}
        self._filled: dict[int, Tensor] = {}

    def __enter__(self) -> FillRecorder:
        self._original = original = nn.Module._load_from_state_dict
        recorder = self

        def watched(module, state_dict, prefix, *args, **kwargs):
            if not prefix and len(state_dict) > len(recorder.file_shapes):
                recorder.file_shapes = {
                    k: tuple(v.shape) for k, v in state_dict.items() if isinstance(v, Tensor)}
            result = original(module, state_dict, prefix, *args, **kwargs)
            # Looked at afterwards: hooks may have resized a tensor to fit (position tables).
            recorder._note(module, state_dict, prefix)
            return result

        nn.Module._load_from_state_dict = watched
        return self

    def __exit__(self, *exc_info) -> None:
        nn.Module._load_from_state_dict = self._original

    def _note(self, module: nn.Module, state_dict: dict, prefix: str) -> None:
        for name, tensor in _own_tensors(module):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                self._filled[id(tensor)] = tensor  # held, so that the id stays its own

    def filled(self, module: nn.Module) -> set[str]:
        """Dotted names of the parameters and buffers of ``module`` that were filled."""
        tensors = (*module.named_parameters(remove_duplicate=False),
                   *module.named_buffers(remove_duplicate=False))
        return {name for name, tensor in tensors if id(tensor) in self._filled}


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
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
            raise ValueError(f'{key}: {pattern!r} is not a regular expression: {error}') from None
        matched = [name for name in names if compiled.fullmatch(name)]
        if not matched:
            raise ValueError(f'{key}: {pattern!r} matches no parameter; '
                             f'the names begin with {", ".join(names[:3])}, …')
        if fixed.issuperset(matched):
            raise ValueError(f'{key}: {pattern!r} matches only parameters that the backbone itself '
                             f'keeps from training (requires_grad=False): {matched[0]}, …')
        keep.update(name for name in matched if name not in fixed)
    frozen = set()
    # Every name of a tensor that modules share: the state dict has it under each.
    parameters = list(module.named_parameters(remove_duplicate=False))
    kept = {id(param) for name, param in parameters if name in keep}
    for name, param in parameters:
        param.requires_grad_(id(param) in kept and name not in fixed)
        if id(param) not in kept:
            frozen.add(name)
    live = {path for path, _ in _live_modules(module)}
    for path, child in module.named_modules(remove_duplicate=False):
        if path not in live:
            frozen.update(
                (f'{path}.' if path else '') + n for n, _ in _own_tensors(child)
                if n in child._buffers)
    return frozen


def _live_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
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
    live = {id(m) for _, m in _live_modules(module)}

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
        # One module's at a time: a copy of the whole network would not be small.
        saved = [(t, t.detach().clone()) for _, t in _own_tensors(current) if id(t) in frozen]
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


def _frozen_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Submodules that declare ``frozen_names``: prompted backbones, under any wrapper."""
    parts = [(path, m) for path, m in model.named_modules()
             if isinstance(m.__dict__.get('frozen_names'), (set, frozenset))]
    if not parts:
        raise ValueError('audit expects a model that holds a PromptedBackbone, '
                         f'got {type(model).__name__} without one')
    return parts


class FrozenSnapshot:
    """Digests of everything a model declares frozen, to compare with later.

    Args:
        model (nn.Module): A model that holds one or more prompted backbones.
    """

    def __init__(self, model: nn.Module) -> None:
        self.digests = self._digest(model)

    @staticmethod
    def _digest(model: nn.Module) -> dict[str, str]:
        digests = {}
        for path, part in _frozen_parts(model):
            prefix = f'{path}.backbone.' if path else 'backbone.'
            tensors = frozen_tensors(part.backbone, part.frozen_names)
            digests.update((prefix + n, d) for n, d in digest_tensors(tensors).items())
        return digests

    def moved(self, model: nn.Module) -> list[str]:
        """Names of the frozen tensors that are not bitwise what they were.

        Args:
            model (nn.Module): The same model, later.

        Returns:
            list[str]: Sorted dotted names; empty when nothing moved.
        """
        now = self._digest(model)
        return sorted(n for n in {*now, *self.digests} if now.get(n) != self.digests.get(n))


def audit(model: nn.Module, snapshot: FrozenSnapshot | None = None, training: bool = False) -> None:
    """Checks that everything declared frozen is frozen.

    That is: no frozen parameter requires or holds a gradient; no frozen submodule is in training
    mode; the frozen tensors have the fingerprint that the model took of them (unless it was
    converted to another dtype since); with a snapshot, every one is bitwise what it was.

    Args:
        model (nn.Module): A model that holds one or more prompted backbones.
        snapshot (FrozenSnapshot, optional): The state to compare with. Defaults to None.
        training (bool): Whether the model must be in training mode, so that the check of the
            modes means something. Defaults to False.

    Raises:
        FrozenTensorsChanged: Something frozen moved or could move; the message names it.
        ValueError: The model holds no prompted backbone.
    """
    for path, part in _frozen_parts(model):
        prefix = f'{path}.backbone.' if path else 'backbone.'
        # A mean teacher trains nothing, and is in eval mode when it predicts.
        trains = any(p.requires_grad for p in part.parameters())
        if training and trains and not part.training:
            raise FrozenTensorsChanged(f'{path or "the model"} is in eval mode, expected training')
        for name, param in part.backbone.named_parameters():
            if name not in part.frozen_names:
                continue
            if param.requires_grad:
                raise FrozenTensorsChanged(
                    f'{prefix}{name} is declared frozen, but its requires_grad is True')
            if param.grad is not None:
                raise FrozenTensorsChanged(f'{prefix}{name} is declared frozen, but has a gradient')
        live = {id(m) for _, m in _live_modules(part.backbone)}
        for name, child in part.backbone.named_modules():
            if child.training and id(child) not in live and (
                    name or not getattr(part, 'root_has_mode', False)):
                raise FrozenTensorsChanged(
                    f'{prefix}{name} ({type(child).__name__}) is frozen, but in training mode')
    moved = [] if snapshot is None else snapshot.moved(model)
    if moved:
        shown = ', '.join(moved[:5]) + (f' and {len(moved) - 5} more' if len(moved) > 5 else '')
        raise FrozenTensorsChanged(f'frozen tensors moved: {shown}')
    for path, part in _frozen_parts(model):  # a snapshot may have been taken too late
        _check_fingerprint(path, part)


def _check_fingerprint(path: str, part: nn.Module) -> None:
    tensors = identity(frozen_tensors(part.backbone, part.frozen_names))
    if part.frozen_dtypes != {name: t.dtype for name, t in tensors.items()}:
        return
    found = bytes(fingerprint(tensors).tolist()).hex()
    if found != part.own_fingerprint:
        raise FrozenTensorsChanged(
            f'{path or "the model"}: frozen tensors are not what they were when the backbone got '
            f'its weights: expected fingerprint {part.own_fingerprint[:16]}…, got {found[:16]}…')
