"""What lean functions share: when to build a graph, in which precision, where tensors come from."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mmprotune.errors import FrozenLayerError

from .precision import Precision

# Torch 2.1 and 2.2 have some things otherwise.
TORCH_BEFORE_2_3 = torch.__version__ < (2, 3)
TORCH_BEFORE_2_4 = torch.__version__ < (2, 4)
_is_compiling = torch._utils.is_compiling if TORCH_BEFORE_2_3 else torch.compiler.is_compiling
_asks_exporting = getattr(torch.compiler, 'is_exporting', bool)


class LeanState:
    """What a lean layer knows besides its parameters. Lies in the layer's ``__dict__``, out of the
    state dict.

    Attributes:
        name (str): The layer's dotted name.
        recomputes (bool): Whether an activation behind it may have the backward pass apply it once
            more.
        rounds (bool): Whether its output may differ from the stock layer's by rounding.
        sdpa (bool): Whether attention uses ``F.scaled_dot_product_attention``.
        drops_weights (bool): Whether who calls it drops the attention's probabilities.
        observer (Callable, optional): Told during a dry run of a :class:`Producer` and of the
            bytes that it could save.
    """
    __slots__ = ('name', 'recomputes', 'rounds', 'sdpa', 'drops_weights', 'observer')

    def __init__(self, name: str = '') -> None:
        self.name = name
        self.recomputes = self.rounds = self.sdpa = self.drops_weights = False
        self.observer = None


def is_recorded() -> bool:
    """Whether ``torch.compile`` or a tracer records the operators instead of running them."""
    return _is_compiling() or torch.jit.is_tracing()


def _is_exporting() -> bool:
    # To what they compile, PyTorch 2.10 and 2.11 answer that it is exported; 2.14 does not.
    flag = getattr(torch.compiler, '_is_exporting_flag', None)
    return _asks_exporting() if flag is None else flag


def is_compiled() -> bool:
    """Whether ``torch.compile`` records a graph whose backward pass it cuts itself, so that lean
    functions may put theirs in. An export only wants the operators; before PyTorch 2.4 the compiler
    takes few functions of one's own."""
    return _is_compiling() and not TORCH_BEFORE_2_4 and not _is_exporting()


def wants_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd is on and one of these tensors requires a gradient.

    Args:
        tensors (Iterable[Tensor | None]): Inputs or parameters.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def builds_graph(*tensors: Tensor | None) -> bool:
    """Whether a function of these tensors has to build an autograd graph of its own.

    Args:
        *tensors (Tensor, optional): Its inputs.
    """
    return wants_gradient(tensors) and not is_recorded()


def check_frozen(*parameters: Tensor | None) -> None:
    """Refuses parameters that would train: a lean function gives them no gradient.

    Args:
        *parameters (Tensor, optional): Parameters of a lean layer.

    Raises:
        FrozenLayerError: Gradient mode is on and one of them requires a gradient.
    """
    if wants_gradient(parameters):
        raise FrozenLayerError(
            'a lean layer gives its own parameters no gradient, but requires_grad of one of them '
            'was set to True after the model was built; name it in model.backbone.trainable '
            'instead, or set model.backbone.lean=False')


def once_differentiable(backward: Callable) -> Callable:
    """PyTorch's decorator, but free of charge where nobody asks for second derivatives: its switch
    of the gradient mode, which is off then, takes as long as a small operator.

    Args:
        backward (Callable): Of a custom function.
    """
    refusing = torch.autograd.function.once_differentiable(backward)

    def run(ctx, *grads):
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


def unviewed(y: Tensor) -> Tensor:
    """What a custom function may return: ``y`` with the same memory, no view as autograd sees it.

    PyTorch lets nobody change a view in place that was made inside a custom function.

    Args:
        y (Tensor): A tensor whose base, if it is a view, nobody else holds.
    """
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


# --- where a tensor comes from ----------------------------------------------------------------


class Unchanged:
    """Frozen tensors that the backward pass reads again, and that are to be then what they are now.

    Args:
        weights (Iterable[Tensor | None]): The tensors.
    """

    def __init__(self, weights: Iterable[Tensor | None]) -> None:
        self._noted = [(w, w._version) for w in weights if w is not None]

    def __add__(self, other: Unchanged) -> Unchanged:
        both = Unchanged(())
        both._noted = self._noted + other._noted
        return both

    def check(self) -> None:
        """As PyTorch does for tensors that are saved.

        Raises:
            FrozenLayerError: One was changed in place.
        """
        if any(w._version != version for w, version in self._noted):
            raise FrozenLayerError(
                'a weight of a frozen layer that the backward pass computes again was modified by '
                'an inplace operation after the forward pass')


class Replay:
    """Computes a tensor again, without a graph and in the precision of the first time.

    Args:
        compute (Callable): Takes the source, returns the tensor.
        precision (Precision): Of the first time.
        weights (Unchanged): What it computes with.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], precision: Precision,
                 weights: Unchanged) -> None:
        self.compute, self.precision, self.weights = compute, precision, weights

    def __call__(self, source: Tensor) -> Tensor:
        self.weights.check()
        with torch.no_grad(), self.precision():
            return self.compute(source)


class Note:
    """Base of what is noted on a tensor. Whoever saves the tensor, or sends it, gets no more of it
    than an empty set, which ``torch.load`` takes."""

    def __reduce__(self):
        return set, ()


class Origin(Note):
    """Notes on a tensor what it can be computed from again, where that is kept anyway.

    A frozen LayerNorm keeps its input. It marks its output with that input, so that whoever needs
    the output in the backward pass keeps the input too, at no cost, and normalises once more.

    Args:
        source (Tensor): What is kept.
        result (Tensor): What is computed from it.
        compute (Callable): How.
        weights (Iterable[Tensor | None]): With what. Defaults to ().
    """

    def __init__(self, source: Tensor, result: Tensor, compute: Callable[[Tensor], Tensor],
                 weights: Iterable[Tensor | None] = ()) -> None:
        self.source = source.detach()
        self.replay = Replay(compute, Precision(source.device), Unchanged(weights))
        self._versions = source._version, result._version
        result._lean_origin = self

    @classmethod
    def of(cls, result: Tensor) -> Origin | None:
        """The origin of a tensor; None where it has none or was changed in place since."""
        origin = getattr(result, '_lean_origin', None)
        if not origin or origin._versions != (origin.source._version, result._version):
            return None
        return origin


class Kept:
    """A tensor that the backward pass needs: the tensor itself is kept, or what it comes from.

    Args:
        tensor (Tensor): The tensor; it may be a view of one that has an :class:`Origin`.

    Attributes:
        source (Tensor, optional): What is kept; None once it has been taken.
        is_free (bool): Whether another function keeps the same thing anyway.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.source: Tensor | None = tensor
        self._replay: Replay | None = None
        self._view: tuple | None = None
        origin = Origin.of(tensor)
        if origin is None and tensor._base is not None:
            origin = Origin.of(tensor._base)
            self._view = tensor.size(), tensor.stride(), tensor.storage_offset()
        if origin is not None:
            self.source, self._replay = origin.source, origin.replay

    @property
    def is_free(self) -> bool:
        return self._replay is not None

    def take(self) -> Tensor:
        """What to hand to ``save_for_backward``; to be called once."""
        source, self.source = self.source, None
        return source

    def __call__(self, source: Tensor) -> Tensor:
        """The tensor, from what was saved."""
        if self._replay is None:
            return source
        tensor = self._replay(source)
        return tensor if self._view is None else tensor.as_strided(*self._view)


class Producer(Note):
    """Notes on a tensor which frozen linear layer made it, and from what.

    An activation that needs its input in the backward pass may then keep the layer's smaller input
    and apply the layer once more. Layers in a row are one producer, a norm behind them included.

    Args:
        x (Tensor): Input of the layer, in the autograd graph.
        result (Tensor): Its output.
        compute (Callable): The layer.
        input_gradient (Callable): Takes the gradient of its output, returns that of its input.
        flops (int): Multiplications of one application.
        owner (LeanState): The layer's.
        weights (Iterable[Tensor | None]): What ``compute`` multiplies and adds.
    """

    def __init__(self, x: Tensor, result: Tensor, compute: Callable[[Tensor], Tensor],
                 input_gradient: Callable[[Tensor], Tensor], flops: int, owner: LeanState,
                 weights: Iterable[Tensor | None]) -> None:
        before = Producer.of(x)
        self.x, self.flops, self.owners = x, flops, (owner, )
        self._weights = Unchanged(weights)
        self._computes, self._gradients = (compute, ), (input_gradient, )
        if before is not None and before.x.nbytes < x.nbytes:
            self.x, self.flops = before.x, before.flops + flops
            self.owners = (*before.owners, owner)
            self._weights = before._weights + self._weights
            self._computes = (*before._computes, compute)
            self._gradients = (*before._gradients, input_gradient)
        self._precision = Precision(x.device)
        self._versions = self.x._version, result._version
        result._lean_producer = self

    @classmethod
    def of(cls, result: Tensor) -> Producer | None:
        """The producer of a tensor; None where it has none, was changed in place since or detached,
        and where somebody waits for the tensor's gradient, which is not computed if its producer is
        used."""
        producer = getattr(result, '_lean_producer', None)
        if not producer or producer._versions != (producer.x._version, result._version):
            return None
        if result.is_leaf or result._backward_hooks or result.retains_grad:
            return None
        return producer

    def then(self, result: Tensor, compute: Callable[[Tensor], Tensor],
             input_gradient: Callable[[Tensor], Tensor],
             weights: Iterable[Tensor | None]) -> None:
        """Notes on a tensor that it is what a norm makes of this one's result: the norm keeps the
        size, so that keeping its own input would save nothing, and has no product of its own.

        Args:
            result (Tensor): The norm's output.
            compute, input_gradient, weights: As of the layer.
        """
        result._lean_producer = other = Producer.__new__(Producer)
        vars(other).update(vars(self))
        other._computes = (*self._computes, compute)
        other._gradients = (*self._gradients, input_gradient)
        other._weights = self._weights + Unchanged(weights)
        other._versions = self.x._version, result._version

    def tell(self, kept: Kept, result: Tensor) -> None:
        """Tells the owner's observer what keeping ``x`` instead of ``result`` saves."""
        observer = self.owners[-1].observer
        if observer is not None:
            observer(self, result.nbytes - (0 if kept.is_free else self.x.nbytes))

    def replay(self) -> Replay:
        """Computes the result from ``x`` again. Does not hold ``x``."""
        computes = self._computes

        def compute(x: Tensor) -> Tensor:
            for layer in computes:
                x = layer(x)
            return x

        return Replay(compute, self._precision, self._weights)

    def input_gradient(self) -> Callable[[Tensor], Tensor]:
        """From the gradient of the result to that of ``x``. Does not hold ``x``."""
        gradients = self._gradients

        def gradient(grad: Tensor) -> Tensor:
            for layer in reversed(gradients):
                grad = layer(grad)
            return grad

        return gradient


class Needed:
    """An input that the backward pass needs again: kept, or made again by the layer that made it.

    Args:
        tensor (Tensor): The input, in the autograd graph.
    """

    def __init__(self, tensor: Tensor) -> None:
        producer = Producer.of(tensor)
        self._x: Tensor | None = tensor if producer is None else producer.x
        self._dtype, self._kept, self._replay = self._x.dtype, Kept(self._x), None
        if producer is not None:
            producer.tell(self._kept, tensor)
            self._replay, self._gradient = producer.replay(), producer.input_gradient()

    def pop(self) -> Tensor:
        """What gets the gradient, in the autograd graph; to be called once."""
        x, self._x = self._x, None
        return x

    def take(self) -> Tensor:
        """What to hand to ``save_for_backward``; to be called once."""
        return self._kept.take()

    def value(self, saved: Tensor) -> Tensor:
        """The input, from what was saved."""
        value = self._kept(saved)
        return value if self._replay is None else self._replay(value)

    def gradient(self, grad: Tensor) -> Tensor:
        """From the gradient of the input to that of what gets it."""
        return (grad if self._replay is None else self._gradient(grad)).to(self._dtype)
