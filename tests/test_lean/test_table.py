import copy

import pytest
import torch
from torch import nn

from mmprotune.lean import make_lean
from mmprotune.lean.base import LeanLayer
from tests.test_lean.networks import (
    images,
)


class OwnForward(nn.Conv2d):

    def forward(self, x):
        return super().forward(x) * 2


def test_a_convolution_with_its_own_forward_is_left_alone_and_reported():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), OwnForward(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    naive = copy.deepcopy(net)
    for p in (*net.parameters(), *naive.parameters()):
        p.requires_grad_(False)
    report = make_lean(net)
    assert type(net[1]) is OwnForward and isinstance(net[0], LeanLayer)
    assert set(report.ordinary) == {'1'} and report.ordinary['1'] > 0.5 * report.kept
    assert '1 ' in str(report) and 'ordinary modules keep' in str(report)
    x = images(1, 3, 16, 16)
    assert torch.equal(net(x), naive(x))


@pytest.mark.parametrize('layer', [nn.Linear(4, 3, dtype=torch.complex64),
                                   nn.Conv2d(4, 3, 1, dtype=torch.complex64)])
def test_complex_layers_are_left_alone(layer):
    """Their gradient takes the conjugate of the weight."""
    net = nn.Sequential(layer).requires_grad_(False)
    assert make_lean(net).covered == {}
