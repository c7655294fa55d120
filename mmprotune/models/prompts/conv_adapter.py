"""The Conv-Adapter: a grouped convolution that narrows, and a 1x1 convolution back.

Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets, Chen et al.,
https://arxiv.org/abs/2208.07463, and its authors' code: the class ``ConvAdapter`` of
Hhhhhhao/Conv-Adapter.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from mmprotune.errors import OptionError
from mmprotune.registry import MODELS

from .base import BasePrompt, build_act, check_kernel_size, check_number, hidden_of


@MODELS.register_module()
class ConvAdapterPrompt(BasePrompt):
    r"""Computes the prompt

    .. math:: P(x) = s \cdot W_2\, \sigma(W_1 * x)

    with :math:`W_1` (``kernel_size``, ``channels -> hidden``, in ``hidden`` groups: each output
    reads its own ``reduction`` channels), :math:`W_2` (1x1, ``hidden -> channels``), both with
    biases, and a learned scale :math:`s` of each channel. The authors put one parallel to each 3x3
    convolution of a ResNet (with ReLU), or 7x7 one of a ConvNeXt (with GELU and the same kernel).

    Args:
        channels (int): Channels of the feature map.
        reduction (float): ``hidden = channels // reduction``, which must divide ``channels``.
            Defaults to 8.
        kernel_size (int): Odd size of the first convolution, in feature pixels. Defaults to 3.
        act_cfg (dict, optional): Activation between the two. Defaults to ``dict(type='ReLU')``.
        scale (float): Start of the learned scales. Defaults to 1.
        zero_init (bool): Whether the last convolution starts at zero, so that training starts from
            the frozen backbone. False draws it as PyTorch does, which is what the authors' block
            does by itself. Defaults to True.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`. Defaults to None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``reduction`` leaves no channels or a number that does not divide ``channels``,
            ``kernel_size`` is even, or ``scale=0`` meets ``zero_init=True`` (neither the scales
            nor the last convolution would ever get a gradient).
    """

    def __init__(self,
                 channels: int,
                 reduction: float = 8,
                 kernel_size: int = 3,
                 act_cfg: dict | None = dict(type='ReLU'),
                 scale: float = 1.,
                 zero_init: bool = True,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        hidden = hidden_of(channels, reduction)
        if channels % hidden:
            raise OptionError(f'prompt.reduction={reduction} leaves {hidden} hidden channels, '
                              f'which have to divide channels={channels}: each reads channels of '
                              'its own')
        check_kernel_size(kernel_size)
        check_number('scale', scale)
        if scale == 0 and zero_init:
            raise OptionError('prompt.scale=0 with prompt.zero_init=True: neither would ever get a '
                              'gradient; set prompt.zero_init=False or another prompt.scale')
        self.channels = channels
        self.zero_init = zero_init
        self.scale_init = scale
        self.reduce = nn.Conv2d(
            channels, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.act = build_act(act_cfg)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.scale = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as PyTorch does; the last convolution is zero."""
        self.reduce.reset_parameters()
        self.expand.reset_parameters()
        nn.init.constant_(self.scale, self.scale_init)
        if self.zero_init:
            nn.init.zeros_(self.expand.weight)
            nn.init.zeros_(self.expand.bias)

    def up(self, hidden: Tensor) -> Tensor:
        """The prompt of the hidden map; see :meth:`BasePrompt.up`."""
        prompt = self.expand(self.act(hidden))
        # In the prompt's precision: autocast's product of the two would be float32.
        return prompt * self.scale.to(prompt.dtype)[:, None, None]
