"""Prompt blocks of many forms in small backbones, and what tests ask of them."""
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmprotune.lean.convert import restore
from mmprotune.registry import MODELS
from tests.conftest import RESNET18, build, wake

PROMPTS = [dict(type='mmprotune.PromptBlock', **cfg) for cfg in (
    {}, dict(scale=0.5), dict(act_cfg=dict(type='PReLU')),
    dict(norm_cfg=dict(type='GN', num_groups=1)), dict(reduction=1, act_cfg=None))]
# A grouped convolution of 3x3 at the start, dropout, and more than a convolution at the start.
OTHERS = [dict(type='mmprotune.ConvAdapterPrompt', zero_init=False),
          dict(type='mmprotune.AdaptFormerPrompt', dropout=0.3, zero_init=False),
          dict(type='mmprotune.MonaPrompt', dropout=0.3, zero_init=False)]


def prompted(backbone=RESNET18, **kwargs):
    torch.manual_seed(0)
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                       **kwargs))
    wake(model)
    return model.train()


def images(seed=0, dtype=torch.float32):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(4)
    outputs = model(x)
    sum((o.sin() * (i + 1)).sum() for i, o in enumerate(outputs)).backward()
    return ([o.detach() for o in outputs],
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})


def ordinary(model):
    model = copy.deepcopy(model)
    restore(model)
    return model


FORMS = [dict(prompts=p, rounds=False) for p in ('output', 'bottleneck', 'input', False)]
forms = pytest.mark.parametrize('lean', FORMS, ids=lambda lean: str(lean['prompts']))


# --- backbones that change features in place -------------------------------------------------


@MODELS.register_module()
class InPlaceStages(nn.Module):
    """Its second stage starts by changing what the first one returned."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, stride=2))

    def forward(self, x):
        return self.b(self.a(x)),


@MODELS.register_module()
class CheckpointedInPlace(InPlaceStages):
    """The same, within an activation checkpoint, which hides what is saved."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


# --- blocks of other types --------------------------------------------------------------------


class Halves(nn.Module):
    """A block that is cut in two; its lower half is one 1x1 convolution."""

    def __init__(self, channels, zero_init=False):
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 1, bias=False)
        self.last = nn.Conv2d(4, channels, 3, padding=1)

    def down(self, x):
        return self.first(x)

    def up(self, hidden):
        return self.last(hidden.tanh() * hidden)

    def forward(self, x):
        return self.up(self.down(x))


@MODELS.register_module()
class OneConvolution(Halves):
    pass


@MODELS.register_module()
class ActiveDown(Halves):

    def down(self, x):
        return self.first(x).tanh()


@MODELS.register_module()
class InPlaceDown(Halves):

    def down(self, x):
        return self.first(x).tanh_()


@MODELS.register_module()
class InPlaceUp(Halves):

    def up(self, hidden):
        return self.last(hidden.tanh_())


@MODELS.register_module()
class OnlyDown(Halves):
    """As wide as the feature, and all of the prompt."""

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = self.last = nn.Conv2d(channels, channels, 1)

    def up(self, hidden):
        return hidden


@MODELS.register_module()
class WideDown(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Conv2d(channels, 4, 3, padding=1)


@MODELS.register_module()
class GroupedDown(Halves):
    """Stride and dilation, too; the upper half makes up for them."""

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Conv2d(channels, 4, 3, 2, padding=2, dilation=2, groups=4)

    def up(self, hidden):
        return super().up(nn.functional.interpolate(hidden, scale_factor=2))


@MODELS.register_module()
class PaddedDown(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Conv2d(channels, 4, 3, padding=1, padding_mode='reflect')


@MODELS.register_module()
class SharedHalves(Halves):
    """Both use the same bias."""

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def down(self, x):
        return self.first(x).tanh() + self.bias

    def up(self, hidden):
        return super().up(hidden + self.bias * hidden)


@MODELS.register_module()
class NormedDown(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.GroupNorm(2, 4))


@MODELS.register_module()
class OwnForward(Halves):
    """Computes something else than the halves that it inherits."""

    def forward(self, x):
        return super().forward(x) * 3


@MODELS.register_module()
class HalvesThatAreLayers(nn.Module):
    """Has layers of these names, between which it does more."""

    def __init__(self, channels, zero_init=False):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return self.up(self.down(x).sin())


@MODELS.register_module()
class Drops(Halves):

    """In both halves."""

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.drop = nn.Dropout2d(0.3)

    def down(self, x):
        return self.drop(self.first(x))

    def up(self, hidden):
        return self.last(self.drop(hidden.tanh() * hidden))


@MODELS.register_module()
class DropsAbove(Drops):
    """In the upper half; the lower one is a convolution."""

    def down(self, x):
        return self.first(x)


@MODELS.register_module()
class KeepsStatistics(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Sequential(nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4))


def of_type(name, **kwargs):
    model = prompted(prompt=dict(type=f'mmprotune.{name}'), **kwargs)
    torch.manual_seed(2)
    for p in model.prompts.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double()
