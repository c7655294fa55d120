"""Which layers of several prompted backbones are the same, and what stands in for them.

Two layers are the same by proof: they are of one class with equal attributes, hold the same frozen
tensors, and are run in the same way. :mod:`~mmprotune.models.session` runs them once for an image.
"""
from __future__ import annotations

import dis
import functools
import threading
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mmprotune.lean.base import LeanLayer
from mmprotune.lean.graph import LeanState
from mmprotune.lean.int8 import weights_in

# What of a module's ``__dict__`` does not say what it computes in eval mode, without a graph.
_IDLE = frozenset(nn.Module().__dict__) - {'training'} | {
    'forward', 'frozen_stages', 'init_cfg', 'lean', 'norm_eval', 'pretrained', 'with_cp',
    '_is_init', '_params_init_info'}
_PLAIN = (str, bytes, int, float, bool, complex, type(None), type, torch.dtype, torch.device,
          frozenset, set)

# ``visit``: of the session that is run on this thread.
running = threading.local()


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
    if not same_value(own, other) or a._modules.keys() != b._modules.keys():
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


def same_value(a, b) -> bool:
    """Whether two attributes, or arguments, are the same; False for what is of an unknown kind."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return equal(a, b)
    if isinstance(a, nn.Module):
        return _same_module(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same_value(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype != object and np.array_equal(a, b)
    if isinstance(a, partial):
        return a.func is b.func and same_value(a.args, b.args) and same_value(
            a.keywords, b.keywords)
    return isinstance(a, _PLAIN) and a == b


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bitwise equal and laid out alike."""
    return a is b or (a.shape, a.dtype, a.device, a.stride()) == (
        b.shape, b.dtype, b.device, b.stride()) and torch.equal(a, b)


# --- what stands in for them ------------------------------------------------------------------


class Shared:
    """Stands in for the ``forward`` of a module that may be shared.

    Outside of a :class:`~mmprotune.models.session.Session` it is that ``forward``. An attribute of
    the module, so that hooks stay outside.

    Attributes:
        copies (bool): Whether what follows changes the output in place, so that others need a copy.
    """

    def __init__(self, module: nn.Module | None, path: str) -> None:
        self.module, self.path, self.copies = module, path, False

    def __call__(self, *args, **kwargs):
        forward = partial(type(self.module).forward, self.module)
        visit = getattr(running, 'visit', None)
        if visit is None or visit.is_over:
            return forward(*args, **kwargs)
        output = visit.run(self, forward, args, kwargs)
        # Behind the first prompt nothing is equal any more.
        visit.is_over = visit.is_over or self.path in visit.prompted
        return output


_SHARED = Shared(None, '')


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
