"""The adapter of two linear layers, pixel by pixel.

Parameter-Efficient Transfer Learning for NLP, Houlsby et al., https://arxiv.org/abs/1902.00751
(Figure 2, right), in the form that Jittor/JPeft gives it on ResNets: the class ``Adapter`` of its
``peft_adapter_resnet.py``.
"""
from __future__ import annotations

from torch import Tensor, nn

from mmprotune.registry import MODELS

from .base import BasePrompt, build_act, hidden_of


@MODELS.register_module()
class LinearAdapterPrompt(BasePrompt):
    r"""Computes the prompt

    .. math:: P(x) = W_2\, \sigma(W_1 x)

    with 1x1 convolutions :math:`W_1` (``channels -> hidden``) and :math:`W_2` (``hidden ->
    channels``), both with biases. JPeft puts one behind the last norm of each residual branch of a
    ResNet, before the addition.

    Args:
        channels (int): Channels of the feature map.
        reduction (float): ``hidden = channels // reduction``. Defaults to 4.
        act_cfg (dict, optional): Activation between the two; None makes the prompt linear in the
            feature. Defaults to ``dict(type='GELU')``.
        zero_init (bool): Whether the last convolution starts at zero, so that training starts from
            the frozen backbone. False draws it as PyTorch does, as JPeft has it. Defaults to True.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`. Defaults to None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``reduction`` leaves no channels.
    """

    def __init__(self,
                 channels: int,
                 reduction: float = 4,
                 act_cfg: dict | None = dict(type='GELU'),
                 zero_init: bool = True,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        hidden = hidden_of(channels, reduction)
        self.channels = channels
        self.zero_init = zero_init
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.act = build_act(act_cfg)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as PyTorch does; the last convolution is zero."""
        self.reduce.reset_parameters()
        self.expand.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.expand.weight)
            nn.init.zeros_(self.expand.bias)

    def up(self, hidden: Tensor) -> Tensor:
        """The prompt of the hidden map; see :meth:`BasePrompt.up`."""
        return self.expand(self.act(hidden))
