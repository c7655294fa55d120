"""Layers of several prompted backbones that compute the same on one image run once.

A layer's output is used again by another backbone where that is the same by proof: both layers are
of one class with equal attributes, hold the same frozen tensors, are run in the same way, and get
equal inputs, down to the last bit. So it does not matter why inputs are equal: prompts that have
not been reached yet and prompts on the outputs alike let everything before them be shared.
"""
from __future__ import annotations

import contextlib
import dis
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mmprotune.lean.dry_run import tensors_in
from mmprotune.lean.graph import LeanState
from mmprotune.lean.int8 import weights_in
from mmprotune.lean.layers import LeanLayer

# What of a module's ``__dict__`` does not say what it computes in eval mode, without a graph.
_IDLE = frozenset(nn.Module().__dict__) - {'training'} | {
    'forward', 'frozen_stages', 'init_cfg', 'lean', 'norm_eval', 'pretrained', 'with_cp',
    '_is_init', '_params_init_info'}
_PLAIN = (str, bytes, int, float, bool, complex, type(None), type, torch.dtype, torch.device,
          frozenset, set)

_thread = threading.local()


# --- which layers are the same ----------------------------------------------------------------


def shared_paths(first: nn.Module, second: nn.Module) -> frozenset[str]:
    """The outermost modules that two networks have in common.

    Args:
        first, second (nn.Module): Networks in eval mode whose frozen tensors lie in one storage.

    Returns:
        frozenset[str]: Dotted paths, '' for the networks themselves. Modules without tensors of
        their own are left out: running them again costs less than looking them up.
    """
    found = set()

    def visit(path: str, a: nn.Module, b: nn.Module) -> None:
        if next(a.parameters(), None) is None and not weights_in(a):
            return
        # A list of modules is never called.
        if type(a).forward is not nn.Module.forward and _same_module(a, b):
            found.add(path)
        # Lean layers may compute with a stand-in in place of a child.
        elif type(a) is type(b) and not isinstance(a, LeanLayer):
            for name, child in a.named_children():
                other = b._modules.get(name)
                if other is not None:
                    visit(f'{path}.{name}' if path else name, child, other)

    visit('', first, second)
    return frozenset(found)


def _same_module(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules compute the same. Hooks on themselves run outside of what is shared."""
    if type(a) is not type(b) or not _same_tensors(a, b) or not _same_lean(a, b):
        return False
    if not all(isinstance(m.__dict__.get('forward', _SHARED), Shared) for m in (a, b)):
        return False
    if _leaves_notes(type(a)):
        return False
    own, other = ({k: v for k, v in m.__dict__.items() if k not in _IDLE} for m in (a, b))
    if not _same_value(own, other) or a._modules.keys() != b._modules.keys():
        return False
    return all(
        x is y or not (x is None or y is None or _has_hooks(x) or _has_hooks(y))
        and _same_module(x, y) for x, y in zip(a._modules.values(), b._modules.values()))


@functools.cache
def _leaves_notes(kind: type) -> bool:
    """Whether a call sets attributes of the module, which somebody may read behind it."""
    code = getattr(kind.forward, '__code__', None)
    if code is None or not code.co_varnames:
        return False
    steps = list(dis.get_instructions(code))
    # Newer versions of Python load two variables in one step.
    return any(step.opname == 'STORE_ATTR' and code.co_varnames[0] in (
        before.argval if isinstance(before.argval, tuple) else (before.argval, ))
        for before, step in zip(steps, steps[1:]))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _same_tensors(a: nn.Module, b: nn.Module) -> bool:
    for own, other in ((a._parameters, b._parameters), (a._buffers, b._buffers)):
        if own.keys() != other.keys():
            return False
        for name, tensor in own.items():
            same = other[name]
            if tensor is None or same is None:
                if tensor is not same:
                    return False
            elif not is_same_storage(tensor, same) and (
                    name in a._parameters or not equal(tensor, same)):
                return False  # parameters that train may be equal now and others later
    return True


def is_same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one in memory."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device) == (
        b.data_ptr(), b.shape, b.stride(), b.dtype, b.device)


def _same_lean(a: nn.Module, b: nn.Module) -> bool:
    states = [m.__dict__.get('lean') for m in (a, b)]
    if not all(isinstance(state, LeanState) for state in states):
        return states[0] is states[1]
    x, y = states
    return (x.rounds, x.sdpa, x.drops_weights) == (y.rounds, y.sdpa, y.drops_weights)


def _same_value(a, b) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return equal(a, b)
    if isinstance(a, nn.Module):
        return _same_module(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same_value(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype != object and np.array_equal(a, b)
    if isinstance(a, partial):
        return a.func is b.func and _same_value(a.args, b.args) and _same_value(
            a.keywords, b.keywords)
    return isinstance(a, _PLAIN) and a == b


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise equal and laid out alike."""
    return a is b or (a.shape, a.dtype, a.device, a.stride()) == (
        b.shape, b.dtype, b.device, b.stride()) and torch.equal(a, b)


# --- one image --------------------------------------------------------------------------------


class Shared:
    """Stands in for the ``forward`` of a module that may be shared.

    Outside of a :class:`Session` it is that ``forward``. An attribute of the module, so that hooks
    stay outside.

    Attributes:
        copies (bool): Whether what follows changes the output in place, so that others need a copy.
    """

    def __init__(self, module: nn.Module | None, path: str) -> None:
        self.module, self.path, self.copies = module, path, False

    def __call__(self, *args, **kwargs):
        forward = partial(type(self.module).forward, self.module)
        visit: _Visit | None = getattr(_thread, 'visit', None)
        if visit is None or visit.is_over:
            return forward(*args, **kwargs)
        output = visit.run(self, forward, args, kwargs)
        # Behind the first prompt nothing is equal any more.
        visit.is_over = visit.is_over or self.path in visit.prompted
        return output


_SHARED = Shared(None, '')


def _copied(value, tensor: Callable[[Tensor], Tensor]):
    """A structure with new containers, and with each tensor as ``tensor`` returns it."""
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, tensor) for item in value)
    if type(value) is dict:
        return {key: _copied(item, tensor) for key, item in value.items()}
    if isinstance(value, (int, float, str, type(None))):
        return value
    raise TypeError(f'{type(value).__name__} cannot be shared')


def _clones() -> Callable[[Tensor], Tensor]:
    made: dict[int, Tensor] = {}
    return lambda tensor: made.setdefault(id(tensor), tensor.clone())


def _versions(*values) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors_in(values)]


def _is_unchanged(versions: list[tuple[Tensor, int]]) -> bool:
    return all(tensor._version == version for tensor, version in versions)


class _Record:
    """One call of a shared module."""

    def __init__(self, task: str, shared: Shared, args: tuple, kwargs: dict) -> None:
        self.task, self.shared, self.args, self.kwargs = task, shared, args, kwargs
        self.inputs = _versions(args, kwargs)  # taken before the call
        self.outputs: list[tuple[Tensor, int]] = []
        self.is_copy = False

    def keep(self, output) -> bool:
        """Notes what was returned; False where it cannot be used again."""
        self.is_copy = self.shared.copies
        try:
            self.output = _copied(output, _clones() if self.is_copy else lambda tensor: tensor)
        except TypeError:
            return False
        self.outputs = _versions(self.output)
        return True

    def suits(self, args: tuple, kwargs: dict) -> bool:
        if not _is_unchanged(self.inputs) or not _same_value((self.args, self.kwargs),
                                                             (args, kwargs)):
            return False
        if not _is_unchanged(self.outputs):
            self.shared.copies = True  # from the next image on
            return False
        return True

    def take(self):
        return _copied(self.output, _clones() if self.is_copy else lambda tensor: tensor)


class _Visit:
    """One task's run in a session."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name, self.is_over = session, name, False
        self.prompted = session.prompted[name]
        earlier, later = session.done, [n for n in session.names
                                        if n not in session.done and n != name]
        self.sources: dict[str, set[str]] = {}
        for other in earlier:
            for path in session.paths(other, name):
                self.sources.setdefault(path, set()).add(other)
        self.kept = frozenset().union(*(session.paths(name, other) for other in later))
        self.taken: list[tuple[str, str]] = []

    def run(self, shared: Shared, forward: Callable, args: tuple, kwargs: dict):
        sources = self.sources.get(shared.path, ())
        for record in self.session.records.get(shared.path, ()):
            if record.task in sources and record.suits(args, kwargs):
                self.taken.append((record.task, shared.path))
                return record.take()
        if shared.path not in self.kept:
            return forward(*args, **kwargs)
        record = _Record(self.name, shared, args, kwargs)
        output = forward(*args, **kwargs)
        if record.keep(output):
            self.session.records.setdefault(shared.path, []).append(record)
        return output


class Session:
    """What some tasks have computed on one image; to be used by one thread.

    Args:
        parts (Mapping[str, nn.Module]): The tasks' prompted backbones, in the order of running.
        paths (Callable): Takes the names of two tasks, returns the :func:`shared_paths` of their
            networks, on which :func:`install` was called.

    Attributes:
        taken (dict[str, list[tuple[str, str]]]): For each task that ran, the modules that it did
            not run itself: whose output was used, and the path.
    """

    def __init__(self, parts: Mapping[str, nn.Module],
                 paths: Callable[[str, str], frozenset[str]]) -> None:
        self.names, self.paths = list(parts), paths
        self.prompted = {name: frozenset(stage.path for stage in part.stages)
                         for name, part in parts.items()}
        self.records: dict[str, list[_Record]] = {}
        self.done: list[str] = []
        self.taken: dict[str, list[tuple[str, str]]] = {}

    @contextlib.contextmanager
    def task(self, name: str) -> Iterator[None]:
        """While open, a task runs on this thread."""
        outer = getattr(_thread, 'visit', None)
        _thread.visit = visit = _Visit(self, name)
        try:
            yield
        finally:
            _thread.visit = outer
            self.done.append(name)
            self.taken[name] = visit.taken


def install(network: nn.Module, paths: frozenset[str]) -> None:
    """Lets modules of a network be shared in sessions; elsewhere they stay as they are.

    Args:
        network (nn.Module): The network.
        paths (frozenset[str]): Of :func:`shared_paths`.
    """
    for path in paths:
        module = network.get_submodule(path)
        if 'forward' not in module.__dict__:
            module.__dict__['forward'] = Shared(module, path)
