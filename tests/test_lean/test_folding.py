import copy

import pytest
import torch
from mmcv.cnn.utils import fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmprotune.lean import make_lean, unfold
from mmprotune.lean.layers import LeanLayer
from tests.conftest import RESNET18
from tests.test_lean.networks import (
    SMALL,
    distance,
    images,
    ordinary,
    outputs_of,
    prompted,
    step,
)


@pytest.mark.parametrize('name', ['resnet', 'regnet', 'hrnet', 'cspnext'])
def test_folded_norms_move_outputs_by_rounding_only(name):
    model = prompted(SMALL[name])
    assert model.lean_report.folded and not model.lean_report.remarks
    naive = ordinary(model)
    x = images(2, 3, 96, 64)
    assert distance(outputs_of(model, x), outputs_of(naive, x)) < 1e-5
    model.eval(), naive.eval()
    with torch.no_grad():
        assert distance(outputs_of(model, x), outputs_of(naive, x)) < 1e-5


@pytest.mark.parametrize('name', ['resnet', 'vit', 'swin'])
def test_unfolded_outputs_are_bitwise_the_stock_ones(name):
    model = prompted(SMALL[name])
    naive = ordinary(model)
    x = images(2, 3, 96, 64)
    assert distance(outputs_of(model, x), outputs_of(naive, x)) < 1e-5
    unfold(model)
    for mode in (True, False):
        model.train(mode), naive.train(mode)
        with torch.set_grad_enabled(mode):
            assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, x),
                                                         outputs_of(naive, x), strict=True))


@pytest.mark.parametrize('name', ['resnet', 'regnet', 'cspnext', 'mobileone'])
def test_fused_norms(name):
    """mmcv's ``fuse_conv_bn`` puts new convolutions' weights, which require gradients, in place."""
    model = prompted(SMALL[name]).double().eval()
    x = images(1, 3, 96, 64, dtype=torch.float64)
    expected = [o.detach() for o in outputs_of(model, x)]
    fused = fuse_conv_bn(copy.deepcopy(model))
    assert any(p.requires_grad for p in fused.backbone.parameters())
    naive = ordinary(fused)
    (outputs, gradients), (_, exact) = step(fused, x), step(naive, x)
    assert distance(outputs, expected) < 1e-10
    assert set(gradients) == set(exact)
    assert distance(gradients.values(), exact.values()) < 1e-8
    with torch.no_grad():
        assert distance(outputs_of(fused, x), expected) < 1e-10


def test_norms_that_are_fused_by_pytorch():
    """It puts a copy of the convolution in place."""
    model = prompted().double().eval()
    x = images(1, 3, 64, 64, dtype=torch.float64)
    expected = [o.detach() for o in outputs_of(model, x)]
    fused = copy.deepcopy(model)
    for holder in (fused.backbone, *fused.backbone.layer1):
        for conv, norm in (('conv1', 'bn1'), ('conv2', 'bn2')):
            if hasattr(holder, conv):
                setattr(holder, conv, fuse_conv_bn_eval(getattr(holder, conv),
                                                        getattr(holder, norm)))
                setattr(holder, norm, nn.Identity())
    assert isinstance(fused.backbone.conv1, LeanLayer)
    (outputs, gradients), (_, exact) = step(fused, x), step(model, x)
    assert distance(outputs, expected) < 1e-10
    assert distance(gradients.values(), exact.values()) < 1e-8


def test_a_layer_that_is_copied_alone_is_a_layer_alone():
    model = prompted()
    naive = ordinary(model)
    conv = copy.deepcopy(model.backbone.layer3[0].conv2)
    norm = copy.deepcopy(model.backbone.layer3[0].bn2)
    assert conv.lean.pair is None and model.backbone.layer3[0].conv2.lean.pair is not None
    x = images(1, conv.in_channels, 8, 8)
    assert torch.equal(conv(x), naive.backbone.layer3[0].conv2(x))
    assert torch.equal(norm(x), naive.backbone.layer3[0].bn2(x))
    # In a network that runs it is one, too.
    model.backbone.layer3[0].conv2, model.backbone.layer3[0].bn2 = conv, norm
    images_ = images(1, 3, 64, 64)
    assert distance(outputs_of(model, images_), outputs_of(naive, images_)) < 1e-5


def test_a_replaced_norm_is_not_applied_twice():
    """MMEngine puts plain norms in place of synchronised ones, and a tool may fuse them."""
    model = prompted(dict(RESNET18, norm_cfg=dict(type='SyncBN')), lean=True)
    x = images(1, 3, 64, 64)
    expected = [o.detach() for o in model.eval()(x)]
    assert model.lean_report.folded
    other = revert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert not isinstance(other.backbone.bn1, LeanLayer)
    assert distance(other(x), expected) < 1e-5


def test_a_hook_on_a_folded_layer_sees_the_stock_network():
    model = prompted().eval()
    naive = ordinary(model)
    seen = []
    for m in (model, naive):
        m.backbone.layer1[0].conv1.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        model(x), naive(x)
    assert distance(seen[:1], seen[1:]) < 1e-5


class Reads(nn.Module):
    """Reads a convolution's output beside its norm, and shares a convolution between two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shared, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.alone, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        x = self.norm(y) + y
        x = self.a(self.shared(x)) + self.b(self.shared(x))
        return self.last(self.alone(x))


def test_only_a_norm_that_alone_reads_a_convolution_is_folded():
    net = Reads().eval()
    naive = copy.deepcopy(net)
    for p in net.parameters():
        p.requires_grad_(False)
    report = make_lean(net)
    assert report.folded == [('alone', 'last')]
    x = images(1, 3, 16, 16)
    torch.testing.assert_close(net(x), naive(x), rtol=1e-5, atol=1e-5)


class Chooses(nn.Module):
    """Turns a difference by rounding into another output."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.norm.running_var.fill_(0.7)

    def forward(self, x):
        return torch.frac(1e6 * self.norm(self.conv(x)))


def test_a_network_that_rounding_changes_is_not_folded():
    net = Chooses().eval()
    naive = copy.deepcopy(net)
    for p in net.parameters():
        p.requires_grad_(False)
    report = make_lean(net)
    assert not report.folded
    assert 'so nothing is folded (as with fold=False)' in report.remarks[0]
    assert isinstance(net.conv, LeanLayer) and not net.conv.lean.rounds
    x = images(1, 3, 16, 16)
    assert torch.equal(net(x), naive(x))
