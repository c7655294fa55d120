"""What every lean layer has, and the classes that are made of one and the stock class."""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .graph import LeanState, wants_gradient
from .int8 import weights_in
from .precision import cast


class LeanLayer:
    """Base of the lean classes.

    Attributes:
        stock_class (type): The class that the module was built as.
        lean (LeanState): What it knows besides its parameters.
    """
    stock_class: type
    lean: LeanState

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether this very module can be lean."""
        return True

    def __reduce_ex__(self, protocol):
        # The lean classes are made on demand, so that pickles name the two that they are made of.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_rebuild, type(self).__bases__, *state)

    def _owner(self) -> LeanState | None:
        return self.lean if self.lean.recomputes else None

    def _own_weight(self) -> Tensor | None:
        """Of attention: the matrix that it multiplies its input by itself, in no child's call."""
        return None

    def _trains(self) -> bool:
        """Whether a parameter of its own has to get a gradient: somebody set ``requires_grad``
        later, or put another one in its place, as tools that fuse norms do."""
        return wants_gradient(self._parameters.values())

    def _stock(self, x: Tensor, *args, **kwargs):
        """What the stock layer computes, gradients of its parameters included. Weights that are
        stored in a lower precision are converted."""
        own = dict(self.named_parameters())
        converted = {n: cast(p, x) for n, p in own.items()}
        converted.update((n, cast(w, x, scale)) for n, (w, scale) in weights_in(self).items())
        same = all(p is own.get(n) for n, p in converted.items())
        layer = self if same else stand_in(self, converted)
        return self.stock_class.forward(layer, x, *args, **kwargs)


def is_hooked(*modules: nn.Module) -> bool:
    """Whether somebody waits for the calls of one of these modules, or the gradients there."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
               or m._backward_pre_hooks for m in modules)


def stand_in(module: nn.Module, parameters: Mapping[str, Tensor], prefix: str = '') -> nn.Module:
    """A module that computes with other tensors in place of its parameters, or still with the same
    ones when the module has others. The module itself stays as it is meanwhile, for other threads.

    Args:
        module (nn.Module): The module.
        parameters (Mapping[str, Tensor]): Tensors by dotted name, of weights in 8 bits too; the
            rest are the module's own.
        prefix (str): What their names begin with. Defaults to ''.
    """
    other = module.__new__(type(module))
    own = {**module._parameters, **{
        n: b for n, b in module._buffers.items() if prefix + n in parameters}}
    other.__dict__.update(
        module.__dict__,
        _parameters={n: parameters.get(prefix + n, p) for n, p in own.items()},
        _buffers={n: b for n, b in module._buffers.items() if n not in own},
        _modules={n: None if child is None else stand_in(child, parameters, f'{prefix}{n}.')
                  for n, child in module._modules.items()})
    return other


_classes: dict[tuple[type, type], type] = {}


def lean_class(lean: type, stock: type) -> type:
    """The class of the layers that were built as one class and are lean by another.

    Args:
        lean (type): A subclass of :class:`LeanLayer`.
        stock (type): The class that they were built as.
    """
    key = lean, stock
    if key not in _classes:
        # Under the stock name, which messages and some hosts read. Should two threads come here at
        # once, both get the same class.
        _classes.setdefault(key, type(stock.__name__, (lean, stock), dict(
            stock_class=stock, __module__=__name__, __qualname__=f'Lean{stock.__name__}',
            __doc__=f'{stock.__qualname__}, lean.')))
    return _classes[key]


def _rebuild(lean: type, stock: type) -> nn.Module:
    """An empty lean module, for unpickling and copying."""
    cls = lean_class(lean, stock)
    return cls.__new__(cls)
