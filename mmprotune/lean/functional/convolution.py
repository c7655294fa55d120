"""Exact autograd functions of layers whose parameters are frozen.

Every function computes what its PyTorch counterpart computes, and passes on the same gradient of
its input; each docstring says what it keeps for that ("nothing": nothing besides the layer's own
parameters and buffers, which exist anyway). Where there is no graph to build (gradient mode off,
an input that requires no gradient) all of them keep nothing. They refuse to be differentiated
twice. Shapes are those of the counterpart.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..graph import (
    FrozenLayerError,
    Kept,
    Origin,
    Precision,
    Producer,
    builds_graph,
    cast,
    check_frozen,
    is_recorded,
    unviewed,
    without_autocast,
)
from ..onednn import pointwise, product, suits_pointwise, suits_product
from .activations import (
    activation,
    clamp,
    hardsigmoid,
    hardtanh,
    leaky_relu,
    relu,
    sigmoid,
    tanh,
)
from .attention import attention, packed_attention
from .pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d

__all__ = [
    'Convolution', 'FrozenLayerError', 'activation', 'adaptive_avg_pool2d', 'attention',
    'avg_pool2d', 'batch_norm', 'cast', 'check_frozen', 'clamp', 'convolution', 'group_norm',
    'hardsigmoid', 'hardtanh', 'layer_norm', 'leaky_relu', 'linear', 'max_pool2d',
    'packed_attention', 'rearranged', 'relu', 'sigmoid', 'tanh', 'unfold'
]

aten = torch.ops.aten

_CONVOLUTIONS = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}


# --- convolution ------------------------------------------------------------------------------


class Convolution:
    """The settings of a convolution over 1 to 3 dimensions, transposed or not.

    Args:
        stride, padding, dilation (Sequence[int]): One number a dimension.
        groups (int): Groups of channels.
        transposed (bool): Whether it is a transposed convolution. Defaults to False.
        output_padding (Sequence[int], optional): Of a transposed one. Defaults to zeros.
        pad (Sequence[int], optional): Padding applied before, as ``F.pad`` takes it. Defaults to
            None.
        pad_mode (str): Its mode. Defaults to 'constant'.
    """

    def __init__(self,
                 stride: Sequence[int],
                 padding: Sequence[int],
                 dilation: Sequence[int],
                 groups: int,
                 transposed: bool = False,
                 output_padding: Sequence[int] | None = None,
                 pad: Sequence[int] | None = None,
                 pad_mode: str = 'constant') -> None:
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        self.transposed = transposed
        self.output_padding = list(output_padding or [0] * len(self.stride))
        self.pad = list(pad) if pad is not None and any(pad) else None
        self.pad_mode = pad_mode

    def apply(self,
                 x: Tensor,
                 weight: Tensor,
                 bias: Tensor | None = None,
                 scale: Tensor | None = None,
                 shift: Tensor | None = None) -> Tensor:
        """Applies the convolution, and ``scale`` and ``shift`` to its output."""
        into_weight = scale is not None and self._into_weight(x.shape, weight)
        weight, bias = cast(weight, x), cast(bias, x)
        if into_weight:
            weight = weight * _columns(scale, weight, 0)
            bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        if self.pad is not None:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        is_matrix = into_weight and self._is_matrix(x, weight, _memory_format(x))
        if is_matrix and suits_pointwise(x, weight):
            return pointwise(x, weight.flatten(1), bias)
        # Where convolutions are products of matrices, PyTorch spreads the bias over the output
        # first, which takes as long as the norm would.
        late = is_matrix and torch.get_num_threads() == 1
        y = self._convolve(x, weight, None if late else bias)
        if late:
            y.add_(_columns(bias, y))
        if scale is not None and not into_weight:
            y.mul_(_columns(scale, y)).add_(_columns(shift, y))
        return y

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # By the functions that autocast knows, on every device.
        plain, transposed = _CONVOLUTIONS[len(self.stride)]
        if self.transposed:
            return transposed(x, weight, bias, self.stride, self.padding, self.output_padding,
                              self.groups, self.dilation)
        return plain(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self,
                       grad: Tensor,
                       weight: Tensor,
                       scale: Tensor | None,
                       shape: Sequence[int],
                       memory_format: torch.memory_format) -> Tensor:
        """The gradient of an input of the given shape and memory format."""
        if scale is not None and self._into_weight(shape, weight):
            weight = weight * _columns(scale, weight, 0)
        elif scale is not None:
            grad = grad * _columns(scale, grad).to(grad.dtype)
        points = self._subsampled(weight, shape)
        if points is not None:
            gradient = grad.new_zeros(shape).contiguous(memory_format=memory_format)
            target = gradient[points]
            target.copy_(self._pointwise().input_gradient(grad, weight, None, target.shape,
                                                          memory_format))
            return gradient
        if self._is_matrix(grad, weight, memory_format):
            matrix = weight.flatten(1).t()
            if suits_pointwise(grad, weight):
                return pointwise(grad, matrix)
            # PyTorch would take a detour through patches.
            if torch.get_num_threads() == 1 and grad.is_contiguous():
                return torch.matmul(matrix.to(grad.dtype), grad.flatten(2)).view(shape)
        # PyTorch's backward asks for the input, but reads no more of it than shape and layout.
        x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
        padded = x if self.pad is None else F.pad(x, self.pad)
        grad = aten.convolution_backward(
            grad, padded, weight.to(grad.dtype), None, self.stride, self.padding, self.dilation,
            self.transposed, self.output_padding, self.groups, [True, False, False])[0]
        if self.pad is None:
            return grad
        with torch.enable_grad():  # padding is linear, so its gradient is the same at zero
            x = x.zero_().requires_grad_()
            return torch.autograd.grad(F.pad(x, self.pad, mode=self.pad_mode), x, grad)[0]

    def _is_pointwise(self, weight: Tensor) -> bool:
        """Whether each output pixel sees one input pixel."""
        return (math.prod(weight.shape[2:]) == 1 and not any(self.padding) and self.pad is None
                and not self.transposed)

    def _pointwise(self) -> Convolution:
        """This convolution on the pixels that it sees."""
        ones = [1] * len(self.stride)
        return Convolution(ones, self.padding, ones, self.groups)

    def _subsampled(self, weight: Tensor, shape: Sequence[int]) -> tuple[slice, ...] | None:
        """The pixels that a pointwise convolution with a stride sees; None for any other."""
        if not self._is_pointwise(weight) or math.prod(self.stride) == 1:
            return None
        return (slice(None), slice(None), *(slice(None, None, s) for s in self.stride))

    def _is_matrix(self, x: Tensor, weight: Tensor,
                   memory_format: torch.memory_format) -> bool:
        """Whether this is one matrix for all pixels of a map on a CPU."""
        return (x.device.type == 'cpu' and self._is_pointwise(weight)
                and math.prod(self.stride) == 1 and self.groups == 1 and x.numel() > 0
                and x.is_contiguous(memory_format=memory_format))

    def _into_weight(self, shape: Sequence[int], weight: Tensor) -> bool:
        """Whether scaling the weight takes fewer multiplications than scaling the output."""
        return not self.transposed and (
            weight.numel() * shape[1] * math.prod(self.stride)
            <= math.prod(shape) * weight.size(0))


def _columns(vector: Tensor, like: Tensor, dim: int = 1) -> Tensor:
    """A vector of one number a channel, shaped to run along dimension ``dim`` of ``like``."""
    return vector.view([-1 if i == dim else 1 for i in range(like.dim())])


def _memory_format(x: Tensor) -> torch.memory_format:
    for dim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(
                memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


class _Convolve(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, conv):
        ctx.save_for_backward(weight, scale)
        ctx.conv, ctx.dtype = conv, x.dtype
        ctx.shape, ctx.memory_format = x.shape, _memory_format(x)
        return conv.apply(x, weight, bias, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        with without_autocast(grad):
            grad = ctx.conv.input_gradient(grad, weight, scale, ctx.shape, ctx.memory_format)
        return grad.to(ctx.dtype), None, None, None, None, None


def convolution(x: Tensor,
                weight: Tensor,
                bias: Tensor | None,
                conv: Convolution,
                scale: Tensor | None = None,
                shift: Tensor | None = None,
                owner: object = None) -> Tensor:
    r"""A convolution with a frozen weight, and with a frozen affine norm after it.

    Keeps nothing; with a norm, its scale (one number a channel).

    Args:
        x (Tensor): Input of shape (N, C, \*) or (C, \*).
        weight (Tensor): Weight.
        bias (Tensor, optional): Bias.
        conv (Convolution): Settings.
        scale, shift (Tensor, optional): Of shape (output channels, ): the output is multiplied by
            the one, then the other is added. Default to None.
        owner (object): Where given, an activation that follows may keep ``x`` and convolve again;
            the owner is how it refers to this layer. Defaults to None.

    Returns:
        Tensor: The output.
    """
    check_frozen(weight, bias, scale, shift)
    if x.dim() == weight.dim() - 1:
        return convolution(x.unsqueeze(0), weight, bias, conv, scale, shift, owner).squeeze(0)
    if not builds_graph(x):
        return conv.apply(x, weight, bias, scale, shift)
    y = _Convolve.apply(x, weight, bias, scale, shift, conv)
    y._lean_fresh = True
    if owner is not None:
        shape, memory_format = x.shape, _memory_format(x)
        Producer(
            x, y, lambda x: conv.apply(x, weight, bias, scale, shift),
            lambda grad: conv.input_gradient(grad, weight, scale, shape, memory_format),
            flops=(x if conv.transposed else y).numel() * weight.numel() // weight.size(0),
            owner=owner)
    return y


# --- linear -----------------------------------------------------------------------------------


class _Linear(Function):

    @staticmethod
    def forward(ctx, x, weight, bias, fast):
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.fast = x.dtype, fast
        return unviewed(_linear(x, weight, bias, fast))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        with without_autocast(grad):
            return _linear_gradient(grad, weight, ctx.fast).to(ctx.dtype), None, None, None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    weight, bias = cast(weight, x), cast(bias, x)
    if not fast:
        return F.linear(x, weight, bias)
    if suits_product(x, weight):
        return product(x, weight, bias)
    # PyTorch multiplies a strided batch by a frozen weight matrix by matrix, which takes longer
    # than a copy and one product.
    return F.linear(x.contiguous(), weight, bias)


def _linear_gradient(grad: Tensor, weight: Tensor, fast: bool) -> Tensor:
    weight = weight.to(grad.dtype)
    if fast and suits_product(grad, weight.t()):
        return product(grad, weight.t())
    return grad.contiguous() @ weight


def linear(x: Tensor,
           weight: Tensor,
           bias: Tensor | None = None,
           owner: object = None,
           fast: bool = False) -> Tensor:
    r"""``F.linear`` with a frozen weight.

    Keeps nothing; under autocast, too (PyTorch keeps a low-precision copy of the weight).

    Args:
        x (Tensor): Input of shape (\*, in features).
        weight (Tensor): Weight of shape (out features, in features).
        bias (Tensor, optional): Bias of shape (out features, ). Defaults to None.
        owner (object): See :func:`convolution`. Defaults to None.
        fast (bool): Whether the output may differ from PyTorch's by rounding. Defaults to False.
    """
    check_frozen(weight, bias)
    fast = fast and not is_recorded()
    if not builds_graph(x):
        return _linear(x, weight, bias, fast)
    y = _Linear.apply(x, weight, bias, fast)
    if owner is not None:
        Producer(
            x, y, lambda x: _linear(x, weight, bias, fast),
            lambda grad: _linear_gradient(grad, weight, fast),
            flops=y.numel() * weight.size(1),
            owner=owner)
    return y


# --- norms ------------------------------------------------------------------------------------


class _BatchNorm(Function):

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0., eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        var, weight = ctx.saved_tensors
        scale = torch.rsqrt(var + ctx.eps)
        if weight is not None:
            scale = scale * weight
        return grad * _columns(scale, grad).to(grad.dtype), None, None, None, None, None


def batch_norm(x: Tensor,
               mean: Tensor,
               var: Tensor,
               weight: Tensor | None = None,
               bias: Tensor | None = None,
               eps: float = 1e-5) -> Tensor:
    r"""``F.batch_norm`` with frozen statistics and parameters. Keeps nothing.

    Args:
        x (Tensor): Input of shape (N, C, \*).
        mean, var (Tensor): Running statistics of shape (C, ).
        weight, bias (Tensor, optional): Of shape (C, ). Default to None.
        eps (float): Added to the variance. Defaults to 1e-5.
    """
    check_frozen(weight, bias)
    if not builds_graph(x):
        return F.batch_norm(x, mean, var, weight, bias, False, 0., eps)
    return _BatchNorm.apply(x, mean, var, weight, bias, eps)


class _LayerNorm(Function):

    @staticmethod
    def forward(ctx, x, kept, shape, weight, bias, eps):
        if Precision(x.device).enabled:  # which knows F.layer_norm and decides its dtype
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
    Origin(source, y, lambda source: F.layer_norm(kept(source), shape, weight, bias, eps))
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
            memory_format = _memory_format(x)
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


# --- rearrangements ---------------------------------------------------------------------------


def rearranged(x: Tensor, result: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Notes that ``result`` is a rearrangement of ``x``, for a norm that follows to keep ``x``.

    Args:
        x (Tensor): What was rearranged.
        result (Tensor): ``compute(x)``.
        compute (Callable): The rearrangement.

    Returns:
        Tensor: ``result``.
    """
    if builds_graph(x):
        kept = Kept(x)
        Origin(kept.take(), result, lambda source: compute(kept(source)))
    return result


def unfold(x: Tensor, kernel_size, dilation=1, padding=0, stride=1) -> Tensor:
    """``F.unfold``. Keeps nothing; a LayerNorm that follows keeps ``x`` and not its patches."""
    settings = kernel_size, dilation, padding, stride
    return rearranged(x, F.unfold(x, *settings), lambda x: F.unfold(x, *settings))
