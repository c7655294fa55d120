"""Lean layers with a parameter that trains after all are ordinary ones."""
import pytest
import torch

from tests.test_lean.networks import SMALL, distance, images, ordinary, outputs_of, prompted, step

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
