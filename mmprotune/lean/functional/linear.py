"""Linear layers with frozen weights."""
from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import onednn
from ..graph import (
    LeanState,
    Producer,
    builds_graph,
    check_frozen,
    is_recorded,
    once_differentiable,
    unviewed,
)
from ..precision import cast, converted, without_autocast


class _Linear(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, fast, scale):
        ctx.save_for_backward(weight, scale)
        ctx.dtype, ctx.fast = x.dtype, fast
        return unviewed(_linear(x, weight, bias, fast, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        with without_autocast(grad):
            grad = _linear_gradient(grad, weight, ctx.fast, scale)
        return grad.to(ctx.dtype), None, None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, fast: bool,
            scale: Tensor | None) -> Tensor:
    weight, bias = cast(weight, x, scale), cast(bias, x)
    if not fast:
        return F.linear(x, weight, bias)
    y = onednn.product(x, weight, bias)
    if y is not None:
        return y
    # PyTorch multiplies a strided batch by a frozen weight matrix by matrix, which takes longer
    # than a copy and one product.
    return F.linear(x.contiguous(), weight, bias)


def _linear_gradient(grad: Tensor, weight: Tensor, fast: bool, scale: Tensor | None) -> Tensor:
    weight = converted(weight, grad.dtype, scale)
    gradient = onednn.product(grad, weight.t()) if fast else None
    return grad.contiguous() @ weight if gradient is None else gradient


def linear(x: Tensor,
           weight: Tensor,
           bias: Tensor | None = None,
           owner: LeanState | None = None,
           fast: bool = False,
           scale: Tensor | None = None) -> Tensor:
    r"""``F.linear`` with a frozen weight.

    Keeps nothing; under autocast, too (PyTorch keeps a low-precision copy of the weight).

    Args:
        x (Tensor): Input of shape (\*, in features).
        weight (Tensor): Weight of shape (out features, in features).
        bias (Tensor, optional): Bias of shape (out features, ). Defaults to None.
        owner (LeanState, optional): See :func:`convolution`. Defaults to None.
        fast (bool): Whether the output may differ from PyTorch's by rounding. Defaults to False.
        scale (Tensor, optional): Of a weight in 8 bits, see :mod:`~mmprotune.lean.int8`. Defaults
            to None.
    """
    check_frozen(weight, bias)
    fast = fast and not is_recorded()
    if not builds_graph(x):
        return _linear(x, weight, bias, fast, scale)
    y = _Linear.apply(x, weight, bias, fast, scale)
    if owner is not None:
        Producer(
            x, y, lambda x: _linear(x, weight, bias, fast, scale),
            lambda grad: _linear_gradient(grad, weight, fast, scale),
            flops=y.numel() * weight.size(1),
            owner=owner, weights=(weight, bias, scale))
    return y
