"""Which stock layer has which lean one, by the class whose ``forward`` it runs.

A subclass with a ``forward`` of its own has none. Hosts are named, not imported.
"""
from __future__ import annotations

from torch import nn

from . import attention_layers, layers, replayed_layers
from .base import lean_class
from .graph import LeanState

_NN = 'torch.nn.modules.'
_MMCV = 'mmcv.cnn.bricks.wrappers.'
_TABLE = {
    **{f'{_NN}conv.Conv{n}d': layers.Conv for n in (1, 2, 3)},
    **{f'{_NN}conv.ConvTranspose{n}d': layers.ConvTranspose for n in (1, 2, 3)},
    **{f'{_MMCV}Conv{n}d': layers.Conv for n in (2, 3)},
    **{f'{_MMCV}ConvTranspose{n}d': layers.ConvTranspose for n in (2, 3)},
    f'{_NN}linear.Linear': layers.Linear,
    f'{_MMCV}Linear': layers.Linear,
    f'{_NN}batchnorm._BatchNorm': layers.BatchNorm,
    f'{_NN}batchnorm.SyncBatchNorm': layers.BatchNorm,
    f'{_NN}normalization.LayerNorm': layers.LayerNorm,
    f'{_NN}normalization.GroupNorm': layers.GroupNorm,
    'timm.layers.norm.LayerNorm': layers.LayerNorm,
    'mmpretrain.models.utils.norm.LayerNorm2d': layers.LayerNorm2d,
    f'{_NN}activation.ReLU': layers.ReLU,
    f'{_NN}activation.Hardtanh': layers.Hardtanh,
    f'{_NN}activation.LeakyReLU': layers.LeakyReLU,
    f'{_NN}activation.Hardsigmoid': layers.Hardsigmoid,
    f'{_NN}activation.Sigmoid': layers.Sigmoid,
    f'{_NN}activation.Tanh': layers.Tanh,
    f'{_NN}activation.GELU': layers.GELU,
    f'{_NN}activation.SiLU': layers.SiLU,
    f'{_NN}activation.Hardswish': layers.Hardswish,
    f'{_NN}activation.Mish': layers.Mish,
    'mmcv.cnn.bricks.swish.Swish': layers.Swish,
    'mmpretrain.models.utils.clip_generator_helper.QuickGELU': layers.QuickGELU,
    'timm.layers.activations.GELU': layers.GELU,
    'timm.layers.activations.GELUTanh': layers.GELUTanh,
    'timm.layers.activations.QuickGELU': layers.QuickGELU,
    f'{_NN}pooling.MaxPool2d': layers.MaxPool2d,
    f'{_MMCV}MaxPool2d': layers.MaxPool2d,
    f'{_NN}pooling.AvgPool2d': layers.AvgPool2d,
    f'{_NN}pooling.AdaptiveAvgPool2d': layers.AdaptiveAvgPool2d,
    f'{_NN}fold.Unfold': layers.Unfold,
    f'{_NN}activation.MultiheadAttention': attention_layers.MultiheadAttention,
    'mmdet.models.backbones.swin.WindowMSA': attention_layers.WindowMSA,
    'mmseg.models.backbones.swin.WindowMSA': attention_layers.WindowMSA,
    'mmpretrain.models.utils.attention.WindowMSA': attention_layers.WindowMSA,
    'mmseg.models.backbones.beit.BEiTAttention': attention_layers.BEiTAttention,
    'mmpretrain.models.utils.attention.BEiTAttention': attention_layers.BEiTAttention,
    'mmpretrain.models.utils.attention.WindowMSAV2': attention_layers.WindowMSAV2,
    'mmpretrain.models.utils.position_encoding.RotaryEmbeddingFast':
        attention_layers.RotaryEmbedding,
    'mmdet.models.backbones.swin.ShiftWindowMSA': attention_layers.ShiftWindowMSA,
    'mmseg.models.backbones.swin.ShiftWindowMSA': attention_layers.ShiftWindowMSA,
    'mmpretrain.models.utils.attention.MultiheadAttention': replayed_layers.FusedAttention,
    'mmpretrain.models.backbones.vit_eva02.AttentionWithRoPE': replayed_layers.RotaryAttention,
    'mmpretrain.models.backbones.vit_sam.Attention': replayed_layers.SAMAttention,
    'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN': replayed_layers.SwiGLU,
    'timm.layers.attention.Attention': replayed_layers.TimmAttention,
    'timm.layers.attention.AttentionRope': replayed_layers.TimmAttention,
    'timm.models.eva.EvaAttention': replayed_layers.TimmAttention,
    'timm.layers.mlp.SwiGLU': replayed_layers.TimmSwiGLU,
    'timm.layers.mlp.GluMlp': replayed_layers.TimmGluMlp,
}
# Modules that use the first of what their nn.MultiheadAttention returns, and drop the second.
DROPS_WEIGHTS = frozenset((
    'mmcv.cnn.bricks.transformer.MultiheadAttention',
    'mmseg.models.backbones.mit.EfficientMultiheadAttention',
    'mmdet.models.backbones.pvt.SpatialReductionAttention',
))
ATTENTION = (attention_layers.MultiheadAttention, attention_layers.WindowMSA,
             attention_layers.BEiTAttention, attention_layers.WindowMSAV2,
             replayed_layers.FusedAttention, replayed_layers.TimmAttention,
             replayed_layers.RotaryAttention, replayed_layers.SAMAttention)
STORES_WEIGHTS = (layers.Conv, layers.Linear, attention_layers.MultiheadAttention)
STOCK_STORES_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)


def forward_name(module: nn.Module) -> str:
    """Qualified name of the class whose ``forward`` the module runs."""
    owner = next(c for c in type(module).__mro__ if 'forward' in vars(c))
    return f'{owner.__module__}.{owner.__qualname__}'


def lean_type(module: nn.Module) -> type | None:
    """The lean layer for a module.

    Args:
        module (nn.Module): A stock module.

    Returns:
        type, optional: A subclass of :class:`~mmprotune.lean.base.LeanLayer`; None where the
        layer is not known, or is used in a way that is not (a ``forward`` of its own, a computed
        weight).
    """
    lean = _TABLE.get(forward_name(module))
    known = lean is not None and 'forward' not in module.__dict__ and lean.suits(module)
    return lean if known else None


def swap(module: nn.Module, lean: type, name: str = '') -> LeanState:
    """Makes a module lean, in place.

    Args:
        module (nn.Module): A stock module.
        lean (type): What :func:`lean_type` returned for it.
        name (str): Its dotted name. Defaults to ''.

    Returns:
        LeanState: Its state, with nothing switched on.
    """
    module.__class__ = lean_class(lean, type(module))
    module.__dict__['lean'] = state = LeanState(name)
    return state
