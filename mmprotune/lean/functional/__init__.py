"""Exact autograd functions of layers whose parameters are frozen.

Every function computes what its PyTorch counterpart computes, and passes on the same gradient of
its input; each docstring says what it saves for that ("nothing": nothing besides the layer's own
parameters and buffers, which exist anyway). Where there is no graph to build (gradient mode off,
an input that requires no gradient) all of them save nothing. They refuse to be differentiated
twice. Shapes are those of the counterpart.
"""
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
from .attention import attention, cosine_attention, packed_attention
from .convolution import Convolution, convolution
from .linear import linear
from .norms import batch_norm, group_norm, layer_norm
from .pooling import adaptive_avg_pool2d, avg_pool2d, max_pool2d
from .rearrange import rearranged, unfold
from .replayed import replayed

__all__ = [
    'Convolution', 'activation', 'adaptive_avg_pool2d', 'attention', 'avg_pool2d', 'batch_norm',
    'clamp', 'convolution', 'cosine_attention', 'group_norm', 'hardsigmoid', 'hardtanh',
    'layer_norm', 'leaky_relu', 'linear', 'max_pool2d', 'packed_attention', 'rearranged', 'relu',
    'replayed', 'sigmoid', 'tanh', 'unfold'
]
