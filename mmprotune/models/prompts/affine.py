"""A scale and a shift of each channel.

Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning (SSF), Lian et al.,
https://arxiv.org/abs/2210.08823, Figure 2 (c), and its authors' code: ``ssf_ada`` of
dongzelian/SSF.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from mmprotune.registry import MODELS

from .base import BasePrompt, check_count


@MODELS.register_module()
class AffinePrompt(BasePrompt):
    r"""Computes the prompt

    .. math:: P(x) = (\gamma - 1) \cdot x + \beta, \qquad x + P(x) = \gamma \cdot x + \beta

    with a scale :math:`\gamma` and a shift :math:`\beta` of each channel. The authors put one
    behind every linear layer, convolution and norm. It has no narrow map: what the backward pass
    keeps for it is the feature from before the addition, which the gradient of :math:`\gamma`
    needs.

    Args:
        channels (int): Channels of the feature map.
        zero_init (bool): Whether scales start at 1 and shifts at 0, so that training starts from
            the frozen backbone. False draws them as the authors do, with a standard deviation of
            0.02 around that. Defaults to True.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`. Defaults to None.

    Raises:
        TypeError, ValueError: ``channels`` is no positive int.
    """
    stands_alone = False

    def __init__(self,
                 channels: int,
                 zero_init: bool = True,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        check_count('channels', channels)
        self.channels = channels
        self.zero_init = zero_init
        self.gamma = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets scales to 1 and shifts to 0, or draws them around that."""
        std = 0. if self.zero_init else 0.02
        nn.init.normal_(self.gamma, mean=1., std=std)
        nn.init.normal_(self.beta, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the prompt.

        Args:
            x (Tensor): Feature map of shape (N, C, H, W), ``C = channels``.

        Returns:
            Tensor: Prompt of the same shape.
        """
        self.check_input(x)
        # In the feature's precision: autocast would leave float32, and a copy of x with it.
        gain, shift = ((self.gamma - 1).to(x.dtype), self.beta.to(x.dtype))
        return x * gain[:, None, None] + shift[:, None, None]
