"""The adapter of AdaptFormer.

AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition, Chen et al.,
https://arxiv.org/abs/2205.13535, and its authors' code: the class ``Adapter`` of
ShoufaChen/AdaptFormer.
"""
from __future__ import annotations

from torch import Tensor, nn

from mmprotune.errors import OptionError
from mmprotune.registry import MODELS

from .base import BasePrompt, check_count, check_dropout, check_number


@MODELS.register_module()
class AdaptFormerPrompt(BasePrompt):
    r"""Computes the prompt

    .. math:: P(x) = f \cdot W_2\, \mathrm{dropout}(\mathrm{ReLU}(W_1 x))

    with 1x1 convolutions :math:`W_1` (``channels -> hidden``) and :math:`W_2` (``hidden ->
    channels``), both with biases, and a constant :math:`f`. The authors put one parallel to the MLP
    of every Transformer block.

    Args:
        channels (int): Channels of the feature map.
        hidden (int): Channels of the hidden map. Defaults to 64.
        dropout (float): Share of hidden elements that training drops. Defaults to 0.1.
        factor (float): What the prompt is multiplied by; it is not learned. Defaults to 0.1.
        zero_init (bool): Whether the last convolution starts at zero, as the authors have it.
            False draws it as the first one. Defaults to True.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`. Defaults to None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A width is less than 1, ``dropout`` no share, or ``factor`` is 0.
    """

    def __init__(self,
                 channels: int,
                 hidden: int = 64,
                 dropout: float = 0.1,
                 factor: float = 0.1,
                 zero_init: bool = True,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        check_count('channels', channels)
        check_count('hidden', hidden)
        check_dropout(dropout)
        check_number('factor', factor)
        if factor == 0:
            raise OptionError('prompt.factor=0: the prompt would be zero for ever')
        self.channels = channels
        self.factor = factor
        self.zero_init = zero_init
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew: as PyTorch does, zero biases, the last convolution zero."""
        for conv in (self.reduce, self.expand):
            conv.reset_parameters()
            nn.init.zeros_(conv.bias)
        if self.zero_init:
            nn.init.zeros_(self.expand.weight)

    def up(self, hidden: Tensor) -> Tensor:
        """The prompt of the hidden map; see :meth:`BasePrompt.up`."""
        return self.expand(self.dropout(self.act(hidden))) * self.factor
