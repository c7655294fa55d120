"""Counts the bytes that autograd keeps for the backward pass."""
from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks


class _Saved:
    """A tensor that autograd saved; goes away together with the node that saved it."""

    __slots__ = ('__weakref__', 'path', 'tensor')

    def __init__(self, tensor: Tensor, path: str) -> None:
        # Detached: a node that holds its own output in a graph would never be freed.
        self.tensor, self.path = tensor.detach(), path


class CountedAs(nn.Module):
    """A function that runs in a module's place: what it saves counts as the module's.

    Args:
        module (nn.Module): The module.
        function (Callable): Takes and returns a tensor.
    """

    def __init__(self, module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.__dict__.update(stands_for=module, function=function)  # no child, no parameters

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class KeptBytes:
    """While open, notes what autograd saves; then tells how many bytes it keeps, and for whom.

    Counted by storage: several views of one memory count once, for the module that saved it first.
    The model's own parameters and buffers do not count. Exact: whatever a function keeps it keeps
    through ``save_for_backward``; outputs that the caller holds are not counted. What other threads
    run meanwhile is not counted either.

    Args:
        model (nn.Module): The model whose forward pass is run inside the ``with`` block.
        by_module (bool): Whether to tell for whom. Not for a network that ``torch.compile``
            compiled, which would compile hooks on its modules into itself. Defaults to True.
    """

    def __init__(self, model: nn.Module, by_module: bool = True) -> None:
        self._paths = {m: path for path, m in model.named_modules()}
        self._own = {_storage(t)[0] for t in (*model.parameters(), *model.buffers())}
        self._stack = ['']
        self._by_module = by_module
        self._thread = threading.get_ident()
        self._saved: list[weakref.ref[_Saved]] = []
        self._handles: list = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            self._pack, lambda saved: saved.tensor)

    def __enter__(self) -> KeptBytes:
        self._handles = [] if not self._by_module else [
            module_hooks.register_module_forward_pre_hook(self._enter_module),
            module_hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc_info) -> None:
        self._hooks.__exit__(*exc_info)
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, module, _) -> None:
        if threading.get_ident() == self._thread:  # these hooks are every thread's
            module = getattr(module, 'stands_for', module)
            self._stack.append(self._paths.get(module, self._stack[-1]))

    def _leave_module(self, *_) -> None:
        if threading.get_ident() == self._thread:
            self._stack.pop()

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor, self._stack[-1])
        self._saved.append(weakref.ref(saved))
        return saved

    def by_module(self) -> dict[str, int]:
        """Bytes kept now, by dotted module name ('': outside of any module)."""
        seen = set(self._own)
        counted: Counter[str] = Counter()
        for saved in (ref() for ref in self._saved):
            if saved is not None:
                place, size = _storage(saved.tensor)
                if place not in seen:
                    seen.add(place)
                    counted[saved.path] += size
        return dict(counted)

    def inside(self, module: nn.Module) -> dict[str, int]:
        """Bytes kept now within one module of the network, by dotted name in it."""
        prefix = f'{self._paths[module]}.' if self._paths[module] else ''
        return {f'{path}.'[len(prefix):-1]: n for path, n in self.by_module().items()
                if f'{path}.'.startswith(prefix)}

    def total(self) -> int:
        """Bytes kept now."""
        return sum(self.by_module().values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
