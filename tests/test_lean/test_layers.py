import copy

import pytest
import torch
from torch import nn

from mmprotune.lean import functional, make_lean
from mmprotune.lean.graph import FrozenLayerError
from tests.test_lean.networks import distance, images, prompted, step


def test_a_strided_batch_is_one_product():
    """Where outputs may differ by rounding; the gradient always."""
    batch = images(6, 5, 4).transpose(0, 1)
    weight, bias = images(7, 4, seed=4), images(7, seed=5)
    for fast in (False, True):
        x = batch.clone().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        assert not x.is_contiguous()
        y = functional.linear(x, weight, bias, fast=fast)
        torch.testing.assert_close(y, torch.nn.functional.linear(batch, weight, bias))
        y.backward(torch.ones(5, 6, 7).transpose(0, 1).contiguous().transpose(0, 1))
        torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 6, 4))


@pytest.mark.parametrize('name', ['GELU', 'GELUTanh', 'QuickGELU'])
def test_activations_of_timm(name):
    stock = getattr(pytest.importorskip('timm.layers.activations'), name)()
    lean = copy.deepcopy(stock)
    assert make_lean(lean).covered
    x = images(2, 3, 8, 8)
    found = []
    for net in (lean, stock):
        image = x.clone().requires_grad_()
        y = net(image)
        y.sin().sum().backward()
        found.append((y, image.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_transposed_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6),
                        nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2)).eval()
    for p in net.parameters():
        p.requires_grad_(False)
    net[1].running_mean.normal_(), net[4].running_mean.normal_()
    naive = copy.deepcopy(net).double()
    report = make_lean(net)
    assert set(report.covered) == set('0123456')
    net.double()
    x = images(2, 3, 12, 10, dtype=torch.float64)
    (outputs, gradients), (expected, exact) = step(net, x), step(naive, x)
    assert distance(outputs, expected) < 1e-10
    assert distance(gradients.values(), exact.values()) < 1e-10
    y = naive[2](naive[1](naive[0](x)))
    size = [naive[3](y).size(2) + 1, naive[3](y).size(3)]
    assert torch.equal(net[3](y, size), naive[3](y, size))


def test_batch_statistics_are_refused():
    model = prompted()
    model.backbone.layer2[0].bn1.train()
    with pytest.raises(FrozenLayerError, match=r'layer2\.0\.bn1: a lean BatchNorm2d is frozen, .* '
                                               r'in training mode'):
        model(images(1, 3, 64, 64))
