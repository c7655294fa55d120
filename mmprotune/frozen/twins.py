"""Lean twins of layers: the same parameters, the same result, a backward pass that keeps less.

A module becomes lean by a change of its class; ``twin_of`` knows the layers that have a twin, by
the class whose ``forward`` they run. A subclass with a ``forward`` of its own has none.
"""
from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import activations
from . import functional as lean
from .kernels import pointwise, suits_pointwise
from .origin import MULTIHEAD_DIVIDES, FrozenLayerError, builds_graph, is_recorded, is_running
from .prompts import PromptAddition


class Twin:
    """Base of the lean classes. State of its own lives in ``__dict__``, out of the state dict.

    Attributes:
        stock_class (type): The class that the module was built as.
        lean_owner (str): The module's dotted name.
        lean_marks (bool): Whether an activation after it may compute it again.
        lean_pair (Pair, optional): The convolution and norm that are computed as one.
        lean_fast (bool): Whether outputs may differ from the stock module's by rounding.
    """
    stock_class: type
    lean_owner = ''
    lean_marks = False
    lean_pair: Pair | None = None
    lean_fast = False

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether this very module can be lean."""
        return True

    def __reduce_ex__(self, protocol):
        # The lean classes are made on demand, so that pickles name the stock one.
        _, _, *state = super().__reduce_ex__(protocol)
        return (_rebuild, (self.stock_class, ), *state)

    def _owner(self) -> str | None:
        return self.lean_owner if self.lean_marks else None

    def _trains(self) -> bool:
        """Whether a parameter of its own has to get a gradient: somebody set ``requires_grad``
        later, or put another one in its place, as tools that fuse norms do."""
        return torch.is_grad_enabled() and any(
            p is not None and p.requires_grad for p in self._parameters.values())

    def _stock(self, x: Tensor, *args):
        """What the stock layer computes, gradients of its parameters included. Weights that are
        stored in a lower precision are converted."""
        own = dict(self.named_parameters())
        converted = {n: lean.cast(p, x) for n, p in own.items()}
        same = all(converted[n] is p for n, p in own.items())
        return self.stock_class.forward(self if same else stand_in(self, converted), x, *args)


def stand_in(module: nn.Module, parameters: Mapping[str, Tensor], prefix: str = '') -> nn.Module:
    """A module that computes with other tensors in place of its parameters. The module itself stays
    as it is meanwhile, for other threads.

    Args:
        module (nn.Module): The module.
        parameters (Mapping[str, Tensor]): Tensors by dotted name; the rest are the module's own.
        prefix (str): What their names begin with. Defaults to ''.
    """
    other = module.__new__(type(module))
    other.__dict__.update(
        module.__dict__,
        _parameters={n: parameters.get(prefix + n, p) for n, p in module._parameters.items()},
        _modules={n: None if child is None else stand_in(child, parameters, f'{prefix}{n}.')
                  for n, child in module._modules.items()})
    return other


class Pair:
    """A frozen convolution and the frozen norm that alone reads its output.

    Args:
        conv (nn.Module): The convolution's twin.
        norm (nn.Module): The norm's twin.
        parent (nn.Module): The module that holds the norm.
        name (str): Its name there.
        network (nn.Module): The network that both are in.
    """

    def __init__(self, conv: nn.Module, norm: nn.Module, parent: nn.Module, name: str,
                 network: nn.Module) -> None:
        self.conv, self.norm, self.parent, self.name = conv, norm, parent, name
        self.network = network

    def __deepcopy__(self, memo: dict) -> Pair | None:
        # A layer that is copied without its network is put elsewhere, as by PyTorch's
        # `fuse_conv_bn_eval`: it is no half of a pair there.
        if id(self.network) not in memo:
            return None
        memo[id(self)] = other = Pair.__new__(Pair)  # the two refer to it
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def is_active(self) -> bool:
        """Whether the two are one now: while their network runs, and not where somebody calls the
        convolution by itself. Hooks on either see what they would see in the stock network, so with
        hooks they are two; so they are once somebody replaces the norm (MMEngine's
        ``revert_sync_batchnorm`` does), the way that one of them is called, or lets one of them
        train, and while the network is recorded."""
        conv, norm = self.conv, self.norm
        return self.parent._modules.get(self.name) is norm and not is_recorded() and is_running(
        ) and not (
            norm.training or conv._forward_hooks or norm._forward_hooks
            or norm._forward_pre_hooks or conv._backward_hooks or norm._backward_hooks
            or conv._backward_pre_hooks or norm._backward_pre_hooks
            or 'forward' in conv.__dict__ or 'forward' in norm.__dict__
            or any(p is not None and p.requires_grad for p in (*conv._parameters.values(),
                                                               *norm._parameters.values()))
            or conv.weight.device != norm.running_var.device)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The norm as a factor and an offset for each channel."""
        norm = self.norm
        with torch.no_grad():
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight
            if norm.bias is None:
                return scale, -norm.running_mean * scale
            return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)


# --- layers with weights ----------------------------------------------------------------------


class _Conv(Twin):

    @staticmethod
    def suits(module: nn.Module) -> bool:
        own = getattr(type(module), '_conv_forward', None)
        stock = {getattr(c, '_conv_forward', None) for c in (
            nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.conv._ConvNd)}  # transposed: the base's
        return _has_weight(module) and (own is None or own in stock)

    def _settings(self, x: Tensor, output_size) -> lean.Convolution:
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
        return lean.Convolution(
            self.stride, padding, self.dilation, self.groups, pad=pad, pad_mode=mode)

    def forward(self, x: Tensor, output_size=None) -> Tensor:
        if self._trains():
            return self._stock(x, *(() if output_size is None else (output_size, )))
        conv = self._settings(x, output_size)
        pair = self.lean_pair
        if pair is None or not pair.is_active():
            return lean.convolution(x, self.weight, self.bias, conv, owner=self._owner())
        y = lean.convolution(
            x, self.weight, self.bias, conv, *pair.affine(), owner=self._owner())
        y._lean_normed_by = pair
        return y


class _ConvTranspose(_Conv):

    def _settings(self, x: Tensor, output_size) -> lean.Convolution:
        output_padding = self._output_padding(x, output_size, self.stride, self.padding,
                                              self.kernel_size, len(self.stride), self.dilation)
        return lean.Convolution(
            self.stride, self.padding, self.dilation, self.groups, True, output_padding)


class _Linear(Twin):

    @staticmethod
    def suits(module: nn.Module) -> bool:
        return _has_weight(module)

    def forward(self, x: Tensor) -> Tensor:
        if self._trains():
            return self._stock(x)
        return lean.linear(x, self.weight, self.bias, self._owner(), self.lean_fast)


class _BatchNorm(Twin):

    @staticmethod
    def suits(module: nn.Module) -> bool:
        return module.track_running_stats and module.running_var is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise FrozenLayerError(
                f'{self.lean_owner}: a lean {self.stock_class.__name__} is frozen, its statistics '
                'too, but is in training mode; call eval() on it, or set lean=False')
        pair = self.lean_pair
        if pair is not None and getattr(x, '_lean_normed_by', None) is pair:
            del x._lean_normed_by
            return x
        if pair is not None and pair.is_active():
            raise FrozenLayerError(
                f'{self.lean_owner}: expected the output of {pair.conv.lean_owner} as it is, '
                'got another tensor; set lean=dict(fold=False)')
        if self._trains():
            return self._stock(x)
        self._check_input_dim(x)
        return lean.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


class _LayerNorm(Twin):

    def forward(self, x: Tensor) -> Tensor:
        if self._trains():
            return self._stock(x)
        return lean.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _LayerNorm2d(Twin):
    """mmpretrain's, over the channels of (N, C, H, W) or (N, H, W, C)."""

    def forward(self, x: Tensor, data_format: str = 'channel_first') -> Tensor:
        known = x.dim() == 4 and data_format in ('channel_first', 'channel_last')
        if not known or self._trains():
            return self._stock(x, data_format)
        settings = self.normalized_shape, self.weight, self.bias, self.eps
        if data_format == 'channel_last':
            return lean.layer_norm(x, *settings)
        return lean.layer_norm(x.permute(0, 2, 3, 1), *settings).permute(0, 3, 1, 2).contiguous()


class _GroupNorm(Twin):

    def forward(self, x: Tensor) -> Tensor:
        if self._trains():
            return self._stock(x)
        return lean.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


# --- layers without weights -------------------------------------------------------------------


class _ReLU(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.relu(x, self.inplace)


class _Hardtanh(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.hardtanh(x, self.min_val, self.max_val, self.inplace)


class _LeakyReLU(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.leaky_relu(x, self.negative_slope, self.inplace)


class _Hardsigmoid(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.hardsigmoid(x, self.inplace)


class _Sigmoid(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.sigmoid(x)


class _Tanh(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.tanh(x)


class _Smooth(Twin):
    act: activations.Smooth

    def forward(self, x: Tensor) -> Tensor:
        if not builds_graph(x):
            return super().forward(x)
        return lean.activation(x, self.act)


class _GELU(_Smooth):

    @property
    def act(self) -> activations.Smooth:
        tanh = getattr(self, 'approximate', 'none') == 'tanh'
        return activations.GELU_TANH if tanh else activations.GELU


class _SiLU(_Smooth):
    act = activations.SILU


class _Hardswish(_Smooth):
    act = activations.HARDSWISH


class _Mish(_Smooth):
    act = activations.MISH


class _Swish(_Smooth):
    act = activations.SWISH


class _MaxPool2d(Twin):

    def forward(self, x: Tensor):
        if self.return_indices:
            return super().forward(x)
        return lean.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


class _AvgPool2d(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.avg_pool2d(x, self.kernel_size, self.stride, self.padding, self.ceil_mode,
                               self.count_include_pad, self.divisor_override)


class _AdaptiveAvgPool2d(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.adaptive_avg_pool2d(x, self.output_size)


class _Unfold(Twin):

    def forward(self, x: Tensor) -> Tensor:
        return lean.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)


# --- attention --------------------------------------------------------------------------------


class _MultiheadAttention(Twin):
    """``nn.MultiheadAttention`` whose caller drops the probabilities that it returns."""
    lean_drops_weights = False
    lean_sdpa = False

    def _trains(self) -> bool:  # it computes with its child's parameters
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def forward(self,
                query: Tensor,
                key: Tensor,
                value: Tensor,
                key_padding_mask: Tensor | None = None,
                need_weights: bool = True,
                attn_mask: Tensor | None = None,
                average_attn_weights: bool = True,
                is_causal: bool = False):
        covered = (
            (self.lean_drops_weights or not need_weights) and not is_recorded()
            and key_padding_mask is None and attn_mask is None and not is_causal
            and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
            and not (self.training and self.dropout) and query.dim() == 3
            and not self._trains())
        if not covered:
            return self._stock(query, key, value, key_padding_mask, need_weights, attn_mask,
                               average_attn_weights, is_causal)
        same = query is key and key is value
        if self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        scale = math.sqrt(1.0 / (self.embed_dim // self.num_heads))
        if same:
            qkv = lean.linear(query, self.in_proj_weight, self.in_proj_bias, self._owner(),
                              self.lean_fast)
            mixed = self._attend(lean.packed_attention, qkv.transpose(0, 1), scale)
        else:
            # In parts, as the stock layer does it, so that every bit is the same.
            weights = self.in_proj_weight.chunk(3)
            biases = (None, ) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = [lean.linear(t, w, b, fast=self.lean_fast).transpose(0, 1)
                         for t, w, b in zip((query, key, value), weights, biases)]
            mixed = self._attend(lean.attention, *projected, scale)
        mixed = mixed.transpose(0, 1)
        out = lean.linear(mixed, self.out_proj.weight, self.out_proj.bias, fast=self.lean_fast)
        return out.transpose(0, 1) if self.batch_first else out, None

    def _attend(self, function, *args) -> Tensor:
        *projected, scale = args
        if not self.lean_sdpa:
            return function(*projected, self.num_heads, scale, divides=MULTIHEAD_DIVIDES)
        if len(projected) == 1:
            projected = projected[0].chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projected)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


class _Calls(threading.local):
    """Calls that this thread is in: the map that a window attention's windows are cut from, and
    how, from the call of the module around it until its own."""

    def __init__(self) -> None:
        self.rearrangements: dict[nn.Module, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}


_calls = _Calls()


class _WindowMSA(Twin):
    """Attention within windows with a relative position bias, of mmdet, mmseg and mmpretrain."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if is_recorded():
            return super().forward(x, mask)
        rearrangement = _calls.rearrangements.pop(self, None)
        if (self.training and self.attn_drop.p) or self._trains():
            return super().forward(x, mask)
        if rearrangement is not None:
            query, windows = rearrangement
            x = lean.rearranged(query, x, windows)
        table = self.relative_position_bias_table
        lean.check_frozen(table)
        tokens = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1)
        biases = [bias.permute(2, 0, 1).contiguous().unsqueeze(0)]
        if mask is not None:
            biases.append(mask.unsqueeze(1))
        y = lean.packed_attention(self.qkv(x), self.num_heads, self.scale, biases)
        return self.proj_drop(self.proj(y))


class _ShiftWindowMSA(Twin):
    """The shifted windows of mmdet and mmseg: tells what the windows are a rearrangement of."""

    def forward(self, query: Tensor, hw_shape) -> Tensor:
        msa = self.w_msa
        # A hook may hand on other windows than it gets.
        if not (builds_graph(query) and isinstance(msa, _WindowMSA)) or msa._forward_pre_hooks:
            return super().forward(query, hw_shape)
        _calls.rearrangements[msa] = query, lambda query: self._lean_windows(query, hw_shape)
        try:
            return super().forward(query, hw_shape)
        finally:
            _calls.rearrangements.pop(msa, None)

    def _lean_windows(self, query: Tensor, hw_shape) -> Tensor:
        size = self.window_size
        x = query.unflatten(1, tuple(hw_shape))
        x = F.pad(x, (0, 0, 0, -x.size(2) % size, 0, -x.size(1) % size))
        if self.shift_size > 0:
            x = x.roll((-self.shift_size, -self.shift_size), dims=(1, 2))
        return self.window_partition(x).view(-1, size * size, x.size(-1))


# --- the prompt block -------------------------------------------------------------------------


class _PromptBlock(Twin):
    """Keeps its output added to its input, or its input, and the narrow output of its first
    convolution, and computes what follows again; or keeps its input only. This one trains: its
    parameters get their gradients."""
    lean_prompts = 'bottleneck'

    @staticmethod
    def suits(module: nn.Module) -> bool:
        # Statistics of a norm must not be updated twice, random numbers not be drawn twice.
        stateful = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
        return not any(isinstance(m, stateful) for m in module.modules())

    @property
    def lean_adds(self) -> bool:
        """Whether it may add its prompt itself now: hooks see what they see on a stock block."""
        return self.lean_prompts == 'output' and not is_recorded() and not any(
            map(_is_hooked, self.modules()))

    def forward(self, x: Tensor, *addition) -> Tensor:
        """The prompt of a feature map. With ``addition``, the last three arguments of
        :class:`~mmprotune.frozen.prompts.PromptAddition`: the feature with its prompt."""
        if addition:
            tail = {n: p for n, p in self.named_parameters(remove_duplicate=False)
                    if not n.startswith('reduce.')}

            def rest(hidden: Tensor, others: Sequence[Tensor] | None = None) -> Tensor:
                block = self if others is None else stand_in(self, dict(zip(tail, others)))
                return block._lean_rest(hidden)

            return PromptAddition(partial(self._lean_pointwise, self.reduce), self.reduce.weight,
                                  self.reduce.bias, rest, list(tail.values()), *addition)(x)
        # What hooks see is computed once.
        if (not torch.is_grad_enabled() or is_recorded() or x.dim() != 4
                or x.size(1) != self.channels
                or any(_is_hooked(m) for m in self.modules() if m is not self)):
            return super().forward(x)
        if self.lean_prompts == 'input':
            return self._lean_again(self.stock_class.forward, x)
        return self._lean_again(type(self)._lean_rest, self.reduce(x))

    def _lean_again(self, method: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> Tensor:
        """Applies a method whose backward pass applies it again, with the parameters of now."""
        named = dict(self.named_parameters(remove_duplicate=False))

        def compute(x: Tensor, *parameters: Tensor) -> Tensor:
            return method(stand_in(self, dict(zip(named, parameters))), x)

        return checkpoint(compute, x, *named.values(), use_reentrant=False,
                          preserve_rng_state=False)

    def _lean_rest(self, hidden: Tensor) -> Tensor:
        hidden = self.act(self.norm(self.spatial(hidden)))
        prompt = self._lean_pointwise(self.expand, hidden)
        return prompt if self.scale is None else prompt * self.scale

    def _lean_pointwise(self, conv: nn.Module, x: Tensor) -> Tensor:
        if self.lean_fast and not torch.is_grad_enabled() and suits_pointwise(x, conv.weight):
            return pointwise(x, conv.weight.flatten(1), conv.bias)
        return conv(x)


# --- who has which twin -----------------------------------------------------------------------

_NN = 'torch.nn.modules.'
_MMCV = 'mmcv.cnn.bricks.wrappers.'
# By the class that defines the `forward` in use. Hosts are named, not imported.
_TWINS = {
    **{f'{_NN}conv.Conv{n}d': _Conv for n in (1, 2, 3)},
    **{f'{_NN}conv.ConvTranspose{n}d': _ConvTranspose for n in (1, 2, 3)},
    **{f'{_MMCV}Conv{n}d': _Conv for n in (2, 3)},
    **{f'{_MMCV}ConvTranspose{n}d': _ConvTranspose for n in (2, 3)},
    f'{_NN}linear.Linear': _Linear,
    f'{_MMCV}Linear': _Linear,
    f'{_NN}batchnorm._BatchNorm': _BatchNorm,
    f'{_NN}batchnorm.SyncBatchNorm': _BatchNorm,
    f'{_NN}normalization.LayerNorm': _LayerNorm,
    f'{_NN}normalization.GroupNorm': _GroupNorm,
    'mmpretrain.models.utils.norm.LayerNorm2d': _LayerNorm2d,
    f'{_NN}activation.ReLU': _ReLU,
    f'{_NN}activation.Hardtanh': _Hardtanh,
    f'{_NN}activation.LeakyReLU': _LeakyReLU,
    f'{_NN}activation.Hardsigmoid': _Hardsigmoid,
    f'{_NN}activation.Sigmoid': _Sigmoid,
    f'{_NN}activation.Tanh': _Tanh,
    f'{_NN}activation.GELU': _GELU,
    f'{_NN}activation.SiLU': _SiLU,
    f'{_NN}activation.Hardswish': _Hardswish,
    f'{_NN}activation.Mish': _Mish,
    'mmcv.cnn.bricks.swish.Swish': _Swish,
    f'{_NN}pooling.MaxPool2d': _MaxPool2d,
    f'{_MMCV}MaxPool2d': _MaxPool2d,
    f'{_NN}pooling.AvgPool2d': _AvgPool2d,
    f'{_NN}pooling.AdaptiveAvgPool2d': _AdaptiveAvgPool2d,
    f'{_NN}fold.Unfold': _Unfold,
    f'{_NN}activation.MultiheadAttention': _MultiheadAttention,
    'mmdet.models.backbones.swin.WindowMSA': _WindowMSA,
    'mmseg.models.backbones.swin.WindowMSA': _WindowMSA,
    'mmpretrain.models.utils.attention.WindowMSA': _WindowMSA,
    'mmdet.models.backbones.swin.ShiftWindowMSA': _ShiftWindowMSA,
    'mmseg.models.backbones.swin.ShiftWindowMSA': _ShiftWindowMSA,
    'mmprotune.models.prompts.prompt_block.PromptBlock': _PromptBlock,
}
# Modules that use the first of what their nn.MultiheadAttention returns, and drop the second.
DROPS_WEIGHTS = frozenset((
    'mmcv.cnn.bricks.transformer.MultiheadAttention',
    'mmseg.models.backbones.mit.EfficientMultiheadAttention',
    'mmdet.models.backbones.pvt.SpatialReductionAttention',
))
ATTENTION = (_MultiheadAttention, _WindowMSA)
CONVOLUTIONS, NORMS, LINEAR, PROMPTS = _Conv, _BatchNorm, _Linear, _PromptBlock
STORES_WEIGHTS = (_Conv, _Linear, _MultiheadAttention)
STOCK_STORES_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)

_classes: dict[tuple[type, type], type] = {}


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def _has_weight(module: nn.Module) -> bool:
    """Whether the weight is a parameter of the module itself, not computed by a hook."""
    return module._parameters.get('weight') is not None


def forward_name(module: nn.Module) -> str:
    """Qualified name of the class whose ``forward`` the module runs."""
    owner = next(c for c in type(module).__mro__ if 'forward' in vars(c))
    return f'{owner.__module__}.{owner.__qualname__}'


def twin_of(module: nn.Module) -> type | None:
    """The lean class for a module.

    Args:
        module (nn.Module): A stock module.

    Returns:
        type, optional: A subclass of its class; None where the layer is not known, or is used in a
        way that is not (a ``forward`` of its own, a computed weight).
    """
    mixin = _TWINS.get(forward_name(module))
    if mixin is None or 'forward' in module.__dict__ or not mixin.suits(module):
        return None
    return _lean_class(type(module), mixin)


def _lean_class(stock: type, mixin: type) -> type:
    key = stock, mixin
    if key not in _classes:
        # Under the stock name, which messages and some hosts read. Should two threads come here at
        # once, both get the same class.
        _classes.setdefault(key, type(stock.__name__, (mixin, stock), dict(
            stock_class=stock, __module__=__name__, __qualname__=f'Lean{stock.__name__}',
            __doc__=f'Lean twin of {stock.__qualname__}.')))
    return _classes[key]


def _rebuild(stock: type) -> nn.Module:
    """An empty lean module, for unpickling and copying."""
    owner = next(c for c in stock.__mro__ if 'forward' in vars(c))
    cls = _lean_class(stock, _TWINS[f'{owner.__module__}.{owner.__qualname__}'])
    return cls.__new__(cls)
