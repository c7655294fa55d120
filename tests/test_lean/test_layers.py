import copy

import pytest
import torch
from torch import nn

from mmprotune.lean import functional, make_lean
from mmprotune.lean.graph import FrozenLayerError
from tests.test_lean.networks import (
    SMALL,
    distance,
    images,
    ordinary,
    outputs_of,
    prompted,
    step,
)


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


THAWED = {
    'resnet': ['layer1.0.conv2.weight', 'layer3.0.bn1.bias', ''],
    'swin': ['stages.1.blocks.1.attn.w_msa.relative_position_bias_table',
             'stages.0.blocks.0.attn.w_msa.qkv.weight', 'stages.2.blocks.0.norm1.weight', ''],
    'vit': ['layers.2.attn.attn.in_proj_weight', 'layers.5.attn.attn.out_proj.bias', ''],
    'convnext': ['norm1.weight', 'downsample_layers.1.0.bias', ''],
    'timm': ['bn1.weight', ''],
    'sam': ['layers.2.attn.rel_pos_h', 'layers.1.attn.qkv.weight'],
    'eva02': ['layers.1.mlp.norm.weight', 'layers.2.mlp.w12.bias', ''],
    'timm_eva02': ['blocks.2.mlp.fc1_g.weight', 'blocks.2.attn.v_proj.bias', ''],
    'dinov3': ['blocks.1.attn.qkv.weight', ''],
}


@pytest.mark.parametrize('name, thawed', [(n, t) for n, ts in THAWED.items() for t in ts])
def test_a_parameter_that_is_thawed_gets_its_gradient(name, thawed):
    """After construction, one or ('') all of them: the layer is an ordinary one then."""
    model = prompted(SMALL[name], lean=dict(recompute=True)).double()
    naive = ordinary(model)
    chosen = []
    for m in (model, naive):
        chosen = [n for n, p in m.backbone.named_parameters() if n.endswith(thawed)]
        for n, p in m.backbone.named_parameters():
            p.requires_grad_(n in chosen)
    assert chosen
    x = images(1, 3, 96, 64, dtype=torch.float64)
    (outputs, gradients), (expected, exact) = step(model, x), step(naive, x)
    assert set(gradients) == set(exact) and {f'backbone.{n}' for n in chosen} <= set(exact)
    assert distance(outputs, expected) < 1e-10
    for n, gradient in exact.items():
        assert (gradients[n] - gradient).norm() <= 1e-8 * gradient.norm().clamp_min(1e-8), n
    with torch.no_grad():
        assert distance(outputs_of(model, x), expected) < 1e-10


@pytest.mark.parametrize('name', ['vit', 'swin', 'resnet'])
def test_a_thawed_layer_whose_weights_are_stored_in_low_precision(name):
    model = prompted(SMALL[name], backbone_dtype='bfloat16')
    stored = {n: p for n, p in model.backbone.named_parameters() if p.dtype == torch.bfloat16}
    for p in stored.values():
        p.requires_grad_()
    _, gradients = step(model, images(1, 3, 96, 64))
    for n, p in stored.items():
        assert gradients[f'backbone.{n}'].dtype == torch.bfloat16
        assert gradients[f'backbone.{n}'].isfinite().all()
        # Not a stand-in's: the layer has its parameters still.
        assert model.backbone.get_parameter(n) is p


def test_batch_statistics_are_refused():
    model = prompted()
    model.backbone.layer2[0].bn1.train()
    with pytest.raises(FrozenLayerError, match=r'layer2\.0\.bn1: a lean BatchNorm2d is frozen, .* '
                                               r'in training mode'):
        model(images(1, 3, 64, 64))
