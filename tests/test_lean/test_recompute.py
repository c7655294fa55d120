import copy

import pytest
import torch
from torch import nn

from mmprotune.lean import make_lean
from mmprotune.lean.recompute import Planner
from tests.test_lean.networks import SMALL, images, kept_by, prompted


@pytest.mark.parametrize('name', ['vit', 'convnext', 'swin', 'timm_vit', 'sam'])
def test_recomputation_is_a_choice(name):
    x = images(2, 3, 96, 64)
    counts = [sum(kept_by(prompted(SMALL[name], lean=dict(recompute=share)), x).values())
              for share in (0, 0.1, True)]
    assert counts[0] > counts[1] >= counts[2]


def attention(name):
    """Attention with three heads and twelve channels that multiplies by ``qkv.weight`` itself."""
    from mmpretrain.models.utils import attention as host
    if name == 'BEiT':
        return host.BEiTAttention(12, 3, window_size=(4, 6), use_rel_pos_bias=True)
    if name == 'Swin V2':
        return host.WindowMSAV2(12, (4, 6), 3)
    return pytest.importorskip('timm.models.eva').EvaAttention(12, 3, scale_norm=False)


@pytest.mark.parametrize('name', ['BEiT', 'Swin V2', 'EVA'])
def test_the_work_of_attention_counts_all_its_projections(name):
    """As the share is of all multiplications: forward, and backward to the input."""
    layer = attention(name).requires_grad_(False)
    make_lean(layer)
    tokens = 25 if name == 'BEiT' else 24
    with Planner(layer) as planner:
        layer(torch.randn(1, tokens, 12).requires_grad_())
    positions = (2 * 4 - 1) * (2 * 6 - 1) * (2 + 3) * 512 if name == 'Swin V2' else 0
    assert planner._work == 2 * tokens * 12 * (36 + 12) + positions


class InPlaceResidual(nn.Module):
    """Adds to the very tensor that a linear layer took."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.act, self.last = (
            nn.Conv2d(3, 6, 1), nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6))

    def forward(self, x):
        x = self.first(x).flatten(2).transpose(1, 2).contiguous()
        x += self.last(self.act(self.wide(x)))
        return x


def test_a_layer_whose_input_is_changed_later_is_not_applied_again():
    stock = InPlaceResidual().requires_grad_(False)
    net = copy.deepcopy(stock)
    report = make_lean(net, dict(rounds=False, recompute=True))
    assert 'wide' in report.covered and report.recomputed == []
    x = images(2, 3, 16, 16).requires_grad_()
    found, exact = (torch.autograd.grad(m(x).sin().sum(), x)[0] for m in (net, stock))
    torch.testing.assert_close(found, exact)
