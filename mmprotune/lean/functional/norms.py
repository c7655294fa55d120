"""Norms with frozen parameters and statistics. What each saves is in its docstring."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..graph import Kept, Origin, Producer, builds_graph, check_frozen, once_differentiable
from ..precision import is_autocast, without_autocast
from .convolution import memory_format_of

aten = torch.ops.aten


class _BatchNorm(Function):

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0., eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _scaled(grad, *ctx.saved_tensors, ctx.eps), None, None, None, None, None


def _scaled(grad: Tensor, var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The gradient of a BatchNorm's input, from that of its output."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    return grad * scale.view(-1, *[1] * (grad.dim() - 2)).to(grad.dtype)


def batch_norm(x: Tensor,
               mean: Tensor,
               var: Tensor,
               weight: Tensor | None = None,
               bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    r"""``F.batch_norm`` with frozen statistics and parameters.

    Keeps nothing. Where the frozen layers before it have an owner (see :func:`convolution`), an
    activation that follows may keep their input, and apply them and this norm once more.

    Args:
        x (Tensor): Input of shape (N, C, \*).
        mean, var (Tensor): Running statistics of shape (C, ).
        weight, bias (Tensor, optional): Of shape (C, ). Default to None.
        eps (float): Added to the variance. Defaults to 1e-5.
    """
    check_frozen(weight, bias)
    if not builds_graph(x):
        return F.batch_norm(x, mean, var, weight, bias, False, 0., eps)
    y = _BatchNorm.apply(x, mean, var, weight, bias, eps)
    producer = Producer.of(x)
    if producer is not None:
        producer.then(y, lambda x: F.batch_norm(x, mean, var, weight, bias, False, 0., eps),
                      lambda grad: _scaled(grad, var, weight, eps), (mean, var, weight, bias))
    return y


class _LayerNorm(Function):

    @staticmethod
    def forward(ctx, x, kept, shape, weight, bias, eps):
        if is_autocast(x.device.type):  # which knows F.layer_norm and decides its dtype
            y, mean, rstd = F.layer_norm(x, shape, weight, bias, eps), None, None
        else:
            y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(kept.take(), mean, rstd, weight, bias)
        ctx.kept, ctx.shape, ctx.eps = kept, shape, eps
        ctx.dtype, ctx.compute_dtype = x.dtype, y.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        source, mean, rstd, weight, bias = ctx.saved_tensors
        with without_autocast(grad):
            x = ctx.kept(source).to(ctx.compute_dtype).contiguous()
            if mean is None:
                _, mean, rstd = torch.native_layer_norm(x, ctx.shape, weight, bias, ctx.eps)
            grad = aten.native_layer_norm_backward(
                grad.contiguous(), x, ctx.shape, mean, rstd, weight, bias, [True, False, False])[0]
        return grad.to(ctx.dtype), None, None, None, None, None


def layer_norm(x: Tensor,
               shape: Sequence[int],
               weight: Tensor | None = None,
               bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    r"""``F.layer_norm`` with frozen parameters.

    Keeps the input, in its own dtype (autocast keeps a float32 copy), or what the input is a mere
    rearrangement of; and two numbers for each set of normalised elements. A function that needs
    the output keeps the same input and normalises again.

    Args:
        x (Tensor): Input of shape (\*, \*shape).
        shape (Sequence[int]): The normalised dimensions.
        weight, bias (Tensor, optional): Of shape ``shape``. Default to None.
        eps (float): Added to the variance. Defaults to 1e-5.
    """
    check_frozen(weight, bias)
    if not builds_graph(x):
        return F.layer_norm(x, shape, weight, bias, eps)
    if x._base is not None and getattr(x._base, '_lean_fresh', False):
        # Nobody else keeps the output of a frozen convolution: keep it in the norm's own layout.
        x = x.contiguous()
    kept = Kept(x)
    source = kept.source
    y = _LayerNorm.apply(x, kept, tuple(shape), weight, bias, eps)
    Origin(source, y, lambda source: F.layer_norm(kept(source), shape, weight, bias, eps),
           (weight, bias))
    return y


class _GroupNorm(Function):

    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps):
        y = F.group_norm(x, groups, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps, ctx.compute_dtype = groups, eps, y.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, weight, bias = ctx.saved_tensors
        with without_autocast(grad):
            x = saved.to(ctx.compute_dtype)
            memory_format = memory_format_of(x)
            x = x.contiguous(memory_format=memory_format)
            grad = grad.contiguous(memory_format=memory_format)
            sizes = x.size(0), x.size(1), math.prod(x.shape[2:]), ctx.groups
            _, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, ctx.eps)
            grad = aten.native_group_norm_backward(grad, x, mean, rstd, weight, *sizes,
                                                   [True, False, False])[0]
        return grad.to(saved.dtype), None, None, None, None


def group_norm(x: Tensor,
               groups: int,
               weight: Tensor | None = None,
               bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    r"""``F.group_norm`` with frozen parameters.

    Keeps the input, in its own dtype (autocast keeps a float32 copy).

    Args:
        x (Tensor): Input of shape (N, C, \*).
        groups (int): Groups of channels.
        weight, bias (Tensor, optional): Of shape (C, ). Default to None.
        eps (float): Added to the variance. Defaults to 1e-5.
    """
    check_frozen(weight, bias)
    if not builds_graph(x) or x.numel() == 0:
        return F.group_norm(x, groups, weight, bias, eps)
    return _GroupNorm.apply(x, groups, weight, bias, eps)
