"""The multi-cognitive visual adapter: depthwise filters of three sizes behind a scaled norm.

5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks, Yin et al.,
https://arxiv.org/abs/2408.08345, and its authors' code: the class ``Mona`` of Leiyi-Hu/mona.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmprotune.registry import MODELS

from .base import BasePrompt, check_count, check_dropout

_SIZES = (3, 5, 7)


@MODELS.register_module()
class MonaPrompt(BasePrompt):
    r"""Computes the prompt

    .. math::
        h &= W_1 (g \cdot \mathrm{LN}(x) + g_x \cdot x) \\
        m &= h + \tfrac{1}{3} (D_3 + D_5 + D_7) * h \\
        P(x) &= W_2\, \mathrm{dropout}(\mathrm{GELU}(m + W_m m))

    with a LayerNorm over channels, scales :math:`g, g_x` of a channel each, 1x1 convolutions
    :math:`W_1` (``channels -> hidden``), :math:`W_m` (``hidden -> hidden``) and :math:`W_2`
    (``hidden -> channels``), and depthwise convolutions :math:`D_k` of ``k x k``, all with biases.
    The authors put one behind both residual additions of every Transformer block.

    Args:
        channels (int): Channels of the feature map.
        hidden (int): Channels of the hidden map. Defaults to 64.
        dropout (float): Share of hidden elements that training drops. Defaults to 0.1.
        zero_init (bool): Whether the last convolution starts at zero, so that training starts from
            the frozen backbone. False draws it as the authors do, with a standard deviation of
            0.02, from which a prompted backbone starts out a little beside it. Defaults to True.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`. Defaults to None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A width is less than 1, or ``dropout`` no share.
    """

    def __init__(self,
                 channels: int,
                 hidden: int = 64,
                 dropout: float = 0.1,
                 zero_init: bool = True,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        check_count('channels', channels)
        check_count('hidden', hidden)
        check_dropout(dropout)
        self.channels = channels
        self.zero_init = zero_init
        self.norm = nn.LayerNorm(channels)
        self.norm_scale = nn.Parameter(torch.empty(channels))
        self.input_scale = nn.Parameter(torch.empty(channels))
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.spatial = nn.ModuleList(
            nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in _SIZES)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as the authors do, except for the last convolution: the outer
        ones normal with a standard deviation of 0.02 and zero biases, those between as PyTorch
        does, 1e-6 for the norm's scale and 1 for the other."""
        self.norm.reset_parameters()
        nn.init.constant_(self.norm_scale, 1e-6)
        nn.init.ones_(self.input_scale)
        for conv in (*self.spatial, self.mix):
            conv.reset_parameters()
        for conv in (self.reduce, self.expand):
            nn.init.trunc_normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)
        if self.zero_init:
            nn.init.zeros_(self.expand.weight)

    def down(self, x: Tensor) -> Tensor:
        """The narrow hidden map, before the depthwise convolutions; see :meth:`BasePrompt.down`."""
        self.check_input(x)
        x = x.permute(0, 2, 3, 1)
        x = self.norm(x) * self.norm_scale + x * self.input_scale
        return self.reduce(x.permute(0, 3, 1, 2))

    def up(self, hidden: Tensor) -> Tensor:
        """The prompt of the hidden map; see :meth:`BasePrompt.up`."""
        # The mean of the three convolutions is one with the mean of their kernels: half the time.
        weight = sum(F.pad(conv.weight, [(_SIZES[-1] - k) // 2] * 4)
                     for k, conv in zip(_SIZES, self.spatial)) / len(_SIZES)
        bias = sum(conv.bias for conv in self.spatial) / len(_SIZES)
        hidden = hidden + F.conv2d(
            hidden, weight, bias, padding=_SIZES[-1] // 2, groups=hidden.size(1))
        return self.expand(self.dropout(self.act(hidden + self.mix(hidden))))
