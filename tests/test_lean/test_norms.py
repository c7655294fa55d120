"""Frozen norms behind convolutions, and what other tools make of the two."""
import copy

import pytest
import torch
from mmcv.cnn.utils import fuse_conv_bn
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mmprotune.lean.base import LeanLayer
from tests.test_lean.networks import (
    SMALL,
    distance,
    images,
    kept_by,
    ordinary,
    outputs_of,
    prompted,
    step,
)


@pytest.mark.parametrize('name', ['resnet', 'regnet', 'hrnet', 'cspnext', 'efficientnet'])
def test_outputs_of_convolutional_backbones_are_bitwise_the_stock_ones(name):
    """Whatever is computed again, and by default."""
    model = prompted(SMALL[name])
    naive = ordinary(model)
    x = images(2, 3, 96, 64)
    for mode in (True, False):
        model.train(mode), naive.train(mode)
        with torch.set_grad_enabled(mode):
            assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, x),
                                                         outputs_of(naive, x), strict=True))


# Its activations need their input, and its blocks widen what they take.
MOBILENET = dict(type='mmpretrain.MobileNetV3', arch='small', out_indices=(0, 3, 8, 11))
WIDENS = 'layer5.expand_conv.conv'


def test_an_activation_computes_a_convolution_and_its_norm_again():
    counts = []
    for share in (0, True):
        model = prompted(MOBILENET, lean=dict(recompute=share))
        assert (WIDENS in model.lean_report.recomputed) == bool(share)
        counts.append(sum(kept_by(model, images(1, 3, 96, 64)).values()))
    assert counts[1] < 0.8 * counts[0]


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


@pytest.mark.parametrize('layer', ['conv', 'bn'])
def test_hooks_see_the_stock_network(layer):
    """Outputs, and gradients, also of what an activation behind it computes again."""
    model = prompted(MOBILENET, lean=dict(recompute=True)).double()
    assert WIDENS in model.lean_report.recomputed
    name = f'layer5.expand_conv.{layer}'
    naive = ordinary(model)
    x = images(1, 3, 64, 64, dtype=torch.float64).requires_grad_()
    seen, made = [], []
    for m in (model, naive):

        def watch(module, args, y):
            y.register_hook(seen.append)
            y.retain_grad()
            seen.append(y.detach().clone())  # a stock activation works in place
            made.append(y)

        m.backbone.get_submodule(name).register_forward_hook(watch)
        sum(o.sin().sum() for o in outputs_of(m, x)).backward()
    y, gradient, expected_y, expected = seen
    assert torch.equal(y, expected_y)
    assert distance([gradient, made[0].grad], [expected, made[1].grad]) < 1e-10
