"""Lean layers: the same parameters, the same result, a backward pass that saves fewer tensors.

A module becomes lean by a change of its class (:func:`~mmprotune.lean.table.swap`).
"""
from __future__ import annotations

from torch import Tensor, nn

from . import functional
from .base import LeanLayer
from .functional import activations
from .graph import FrozenLayerError, Producer, builds_graph
from .int8 import scale_of


def _has_weight(module: nn.Module) -> bool:
    """Whether the weight is a parameter of the module itself, not computed by a hook, and real."""
    weight = module._parameters.get('weight')
    return weight is not None and weight.is_floating_point()


# --- layers with weights ----------------------------------------------------------------------


class Conv(LeanLayer):

    @staticmethod
    def suits(module: nn.Module) -> bool:
        own = getattr(type(module), '_conv_forward', None)
        stock = {getattr(c, '_conv_forward', None) for c in (
            nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.conv._ConvNd)}  # transposed: the base's
        return _has_weight(module) and (own is None or own in stock)

    def _settings(self, x: Tensor, output_size) -> functional.Convolution:
        if self.padding_mode != 'zeros':
            padding, pad = [0] * len(self.stride), self._reversed_padding_repeated_twice
        elif isinstance(self.padding, str):
            # 'same': an odd total goes to the end of the dimension.
            total = [0 if self.padding == 'valid' else d * (k - 1)
                     for d, k in zip(self.dilation, self.kernel_size)]
            padding = [t // 2 for t in total]
            pad = [n for t in reversed(total) for n in (0, t % 2)]
        else:
            padding, pad = self.padding, None
        mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
        return functional.Convolution(
            self.stride, padding, self.dilation, self.groups, pad=pad, pad_mode=mode)

    def forward(self, x: Tensor, output_size=None) -> Tensor:
        if self._trains():
            return self._stock(x, *(() if output_size is None else (output_size, )))
        return functional.convolution(
            x, self.weight, self.bias, self._settings(x, output_size), self._owner(),
            scale_of(self))


class ConvTranspose(Conv):

    def _settings(self, x: Tensor, output_size) -> functional.Convolution:
        output_padding = self._output_padding(x, output_size, self.stride, self.padding,
                                              self.kernel_size, len(self.stride), self.dilation)
        return functional.Convolution(
            self.stride, self.padding, self.dilation, self.groups, True, output_padding)


class Linear(LeanLayer):

    @staticmethod
    def suits(module: nn.Module) -> bool:
        return _has_weight(module)

    def forward(self, x: Tensor) -> Tensor:
        if self._trains():
            return self._stock(x)
        return functional.linear(
            x, self.weight, self.bias, self._owner(), self.lean.rounds, scale_of(self))


class BatchNorm(LeanLayer):

    @staticmethod
    def suits(module: nn.Module) -> bool:
        return module.track_running_stats and module.running_var is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise FrozenLayerError(
                f'{self.lean.name}: a lean {self.stock_class.__name__} is frozen, its statistics '
                'too, but is in training mode; call eval() on it, or set lean=False')
        if self._trains():
            return self._stock(x)
        self._check_input_dim(x)
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


class LayerNorm(LeanLayer):

    @staticmethod
    def suits(module: nn.Module) -> bool:
        return not getattr(module, '_fast_norm', False)  # timm's, which may compute otherwise

    def forward(self, x: Tensor) -> Tensor:
        if self._trains():
            return self._stock(x)
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm2d(LeanLayer):
    """mmpretrain's, over the channels of (N, C, H, W) or (N, H, W, C)."""

    def forward(self, x: Tensor, data_format: str = 'channel_first') -> Tensor:
        known = x.dim() == 4 and data_format in ('channel_first', 'channel_last')
        if not known or self._trains():
            return self._stock(x, data_format)
        settings = self.normalized_shape, self.weight, self.bias, self.eps
        if data_format == 'channel_last':
            return functional.layer_norm(x, *settings)
        y = functional.layer_norm(x.permute(0, 2, 3, 1), *settings)
        return y.permute(0, 3, 1, 2).contiguous()


class GroupNorm(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        if self._trains():
            return self._stock(x)
        return functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


# --- layers without weights -------------------------------------------------------------------


class ReLU(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x, self.inplace)


class Hardtanh(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.hardtanh(x, self.min_val, self.max_val, self.inplace)


class LeakyReLU(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(x, self.negative_slope, self.inplace)


class Hardsigmoid(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.hardsigmoid(x, self.inplace)


class Sigmoid(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.sigmoid(x)


class Tanh(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.tanh(x)


class Smooth(LeanLayer):
    act: activations.Smooth

    def forward(self, x: Tensor) -> Tensor:
        in_place = getattr(self, 'inplace', False)
        # In place PyTorch keeps the input, too: a copy.
        if not builds_graph(x) or (in_place and Producer.of(x) is None):
            return super().forward(x)
        y = functional.activation(x, self.act)
        if in_place:  # whoever else holds the input sees it, and it is no producer's any more
            y = x.detach_().copy_(y)
            del y._lean_producer
        return y


class GELU(Smooth):

    @property
    def act(self) -> activations.Smooth:
        tanh = getattr(self, 'approximate', 'none') == 'tanh'
        return activations.GELU_TANH if tanh else activations.GELU


class GELUTanh(Smooth):
    act = activations.GELU_TANH


class QuickGELU(Smooth):
    act = activations.QUICK_GELU


class SiLU(Smooth):
    act = activations.SILU


class Hardswish(Smooth):
    act = activations.HARDSWISH


class Mish(Smooth):
    act = activations.MISH


class Swish(Smooth):
    act = activations.SWISH


class MaxPool2d(LeanLayer):

    def forward(self, x: Tensor):
        if self.return_indices:
            return super().forward(x)
        return functional.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class AvgPool2d(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode,
                               self.count_include_pad, self.divisor_override)


class AdaptiveAvgPool2d(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, self.output_size)


class Unfold(LeanLayer):

    def forward(self, x: Tensor) -> Tensor:
        return functional.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
