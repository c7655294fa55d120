"""The prompt block of Pro-tuning.

Pro-tuning: Unified Prompt Tuning for Vision Tasks, Nie et al., https://arxiv.org/abs/2207.14381,
Figure 2: 1x1 convolution -> 5x5 convolution -> 1x1 convolution; its output is the vision prompt.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from mmprotune.errors import OptionError
from mmprotune.registry import MODELS

from .base import (
    BasePrompt,
    build_act,
    build_norm,
    check_count,
    check_kernel_size,
    check_number,
    hidden_of,
)


@MODELS.register_module()
class PromptBlock(BasePrompt):
    r"""Computes the vision prompt :math:`P(x)` of one stage's feature map.

    .. math:: P(x) = s \cdot W_3\, \sigma(\mathrm{norm}(W_2 * (W_1 x)))

    with :math:`W_1` (1x1, ``channels -> hidden``), :math:`W_2` (``kernel_size``, grouped, ``hidden
    -> hidden``), :math:`W_3` (1x1, ``hidden -> channels``), all with biases. The prompt only: who
    calls adds it to ``x``.

    The paper's text leaves widths, groups, norm, activation and initialisation open. The defaults
    are this package's: a bottleneck of 4, a depthwise 5x5, GELU, and a last convolution that
    starts at zero, so that a prompted backbone starts out equal to the frozen one. The figure's
    own form is ``dict(type='mmprotune.PromptBlock', reduction=1, act_cfg=None)`` together with
    ``last_stage='serial'`` of :class:`PromptedBackbone`.

    Args:
        channels (int): Channels of the feature map.
        reduction (float): ``hidden = channels // reduction``. Defaults to 4.
        kernel_size (int): Odd size of the middle convolution, in feature pixels. Defaults to 5.
        groups (int, optional): Groups of the middle convolution; must divide ``hidden``. None
            means depthwise. Defaults to None.
        norm_cfg (dict, optional): Normalisation after the middle convolution. Defaults to None.
        act_cfg (dict, optional): Activation after it. Defaults to ``dict(type='GELU')``.
        scale (float, optional): Start of a learned scalar on the prompt; None means no scalar.
            Defaults to None.
        zero_init (bool): Whether the last convolution starts at zero. Defaults to True.
        init_cfg (dict, optional): See :class:`mmengine.model.BaseModule`. Defaults to None.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``reduction`` leaves no channels, ``kernel_size`` is even, ``groups`` does not
            divide the hidden channels, or ``scale=0`` meets ``zero_init=True`` (neither the
            scalar nor the last convolution would ever get a gradient).
    """

    def __init__(self,
                 channels: int,
                 reduction: float = 4,
                 kernel_size: int = 5,
                 groups: int | None = None,
                 norm_cfg: dict | None = None,
                 act_cfg: dict | None = dict(type='GELU'),
                 scale: float | None = None,
                 zero_init: bool = True,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        check_count('channels', channels)
        check_kernel_size(kernel_size)
        hidden = hidden_of(channels, reduction)
        groups = hidden if groups is None else groups
        if not isinstance(groups, int) or groups < 1 or hidden % groups:
            raise OptionError(f'prompt.groups must divide the {hidden} hidden channels '
                              f'(channels={channels}, reduction={reduction}), got {groups!r}')
        if scale is not None:
            check_number('scale', scale)
        if scale == 0 and zero_init:
            raise OptionError('prompt.scale=0 with prompt.zero_init=True: neither would ever get a '
                              'gradient; set prompt.zero_init=False or another prompt.scale')

        self.channels = channels
        self.zero_init = zero_init
        self.scale_init = scale
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.spatial = nn.Conv2d(
            hidden, hidden, kernel_size, padding=kernel_size // 2, groups=groups)
        self.norm = build_norm(norm_cfg, hidden)
        self.act = build_act(act_cfg)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.scale = None if scale is None else nn.Parameter(torch.tensor(float(scale)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew: Kaiming-normal (fan in), zero biases, the last one zero."""
        for conv in (self.reduce, self.spatial, self.expand):
            nn.init.kaiming_normal_(conv.weight, mode='fan_in', nonlinearity='linear')
            nn.init.zeros_(conv.bias)
        if self.zero_init:
            nn.init.zeros_(self.expand.weight)
        if self.scale is not None:
            nn.init.constant_(self.scale, self.scale_init)

    def up(self, hidden: Tensor) -> Tensor:
        """The prompt of the hidden map; see :meth:`BasePrompt.up`."""
        prompt = self.expand(self.act(self.norm(self.spatial(hidden))))
        return prompt if self.scale is None else prompt * self.scale
