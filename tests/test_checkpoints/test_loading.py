"""Files and models that are not quite alike: image size, precision, what is frozen."""
import pytest
import torch
from mmengine.runner import load_checkpoint

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from mmprotune.errors import (
    FingerprintMismatch,
    IncompleteCheckpoint,
)
from tests.conftest import build

from .models import prompted_config, same_weights, save_model, trained_model

_VIT = dict(
    type='mmpretrain.VisionTransformer', patch_size=8, out_type='featmap',
    arch=dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32))

_BEIT = dict(
    type='mmpretrain.BEiTViT', patch_size=8, out_type='featmap', use_abs_pos_emb=True,
    use_rel_pos_bias=False,
    arch=dict(embed_dims=16, num_layers=4, num_heads=2, feedforward_channels=32))

_SWIN = dict(embed_dims=8, depths=[2, 2], num_heads=[1, 2])

_SWINS = dict(
    swin=dict(type='mmpretrain.SwinTransformer', use_abs_pos_embed=True, window_size=4,
              out_indices=(0, 1), arch=_SWIN),
    swin_v2=dict(type='mmpretrain.SwinTransformerV2', use_abs_pos_embed=True, window_size=4,
                 out_indices=(0, 1), arch=dict(_SWIN, extra_norm_every_n_blocks=0)))

_BY_SIZE = dict(vit=_VIT, beit=_BEIT, **_SWINS)


@pytest.mark.parametrize('name', _BY_SIZE)
def test_a_stock_checkpoint_of_another_image_size(name, tmp_path):
    """Comes in as it does into the stock backbone; a full prompted one likewise."""
    small, large = (dict(_BY_SIZE[name], img_size=size) for size in (32, 64))
    stock = build(small, seed=2)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_()
    expected = build(large, seed=1)
    expected.load_state_dict(stock.state_dict(), strict=False)
    assert any(a.shape != b.shape for a, b in zip(stock.parameters(), expected.parameters()))

    def prompted(backbone):
        return build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                          prompt=None, lean=False), seed=1)

    path = save_model({f'backbone.{k}': v for k, v in stock.state_dict().items()},
                      tmp_path / 'a.pth')
    model = torch.nn.ModuleDict(dict(backbone=prompted(large)))
    load_checkpoint(model, path)
    _check_filled(model.backbone.backbone, expected)
    filled = prompted(small)
    filled.load_state_dict(stock.state_dict())
    full = torch.nn.ModuleDict(dict(backbone=filled))
    path = save_model(checkpoint.full_state_dict(full), tmp_path / 'full.pth')
    model = torch.nn.ModuleDict(dict(backbone=prompted(large)))
    checkpoint.load(model, path)
    _check_filled(model.backbone.backbone, expected)
    # What came is checked against the fingerprint before it is resized.
    content = torch.load(path)
    next(v for k, v in content['state_dict'].items() if v.dim() > 1).add_(1)
    with pytest.raises(FingerprintMismatch, match='damaged or was put together from two'):
        checkpoint.load(model, save_model(content['state_dict'], tmp_path / 'damaged.pth'))


def _check_filled(backbone, expected):
    parameters = dict(expected.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in backbone.named_parameters())
    backbone.eval(), expected.eval()
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        for a, b in zip(backbone(x), expected(x)):
            assert torch.equal(a, b)


def test_a_table_that_fits_nothing_is_refused(tmp_path):
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=dict(_VIT, img_size=32),
                       freeze='all', lean=False))
    for shape in ((7, ), (1, 3, 5)):
        state_dict = dict(model.backbone.state_dict(), pos_embed=torch.zeros(shape))
        with pytest.raises(IncompleteCheckpoint, match='does not fit'):
            model.load_state_dict(state_dict, strict=False)


def _low(file):
    return prompted_config(file, backbone_dtype='bfloat16', lean=True)


def test_full_files_of_another_precision(file, tmp_path):
    """float32 into bfloat16 and back. What has arrived is what came, cast."""
    full, low = trained_model(prompted_config(file)), trained_model(_low(file))
    path = save_model(checkpoint.full_state_dict(full), tmp_path / 'full.pth')
    identity = low.backbone.frozen_fingerprint.clone()
    checkpoint.load(low, path)
    conv = full.backbone.backbone.conv1.weight
    assert torch.equal(low.backbone.backbone.conv1.weight, conv.bfloat16())
    assert torch.equal(low.backbone.frozen_fingerprint, identity)
    path = save_model(checkpoint.full_state_dict(low), tmp_path / 'low.pth')
    checkpoint.load(full, path)
    assert torch.equal(full.backbone.backbone.conv1.weight, conv.bfloat16().float())
    content = torch.load(path)['state_dict']
    content['backbone.backbone.conv1.weight'][0, 0, 0, 0] += 1
    for model in (full, low):
        with pytest.raises(FingerprintMismatch, match='damaged'):
            checkpoint.load(model, save_model(content, tmp_path / 'damaged.pth'))


def test_full_files_and_weights_in_8_bits(file, tmp_path):
    """Floating point is rounded when it comes in; 8 bits come in as they are, and only there."""
    full = trained_model(prompted_config(file))
    low, again = (trained_model(prompted_config(file, backbone_dtype='int8', lean=True))
                  for _ in range(2))
    identity = low.backbone.frozen_fingerprint.clone()
    path = save_model(checkpoint.full_state_dict(full), tmp_path / 'full.pth')
    content = torch.load(path)['state_dict']
    with torch.no_grad():
        for tensor in low.backbone.frozen_tensors().values():
            tensor.zero_()
    checkpoint.load(low, path)
    conv, scale = (low.backbone.frozen_tensors()[f'conv1.weight{end}'] for end in ('', '_scale'))
    expected = full.backbone.backbone.conv1.weight
    assert conv.dtype == torch.int8
    assert (scale * conv - expected).abs().max() <= 0.5001 * scale.max()
    assert torch.equal(low.backbone.frozen_fingerprint, identity)
    path = save_model(checkpoint.full_state_dict(low), tmp_path / 'low.pth')
    checkpoint.load(again, path)
    assert same_weights(low, again)
    with pytest.raises(IncompleteCheckpoint, match='conv1.weight_scale.*expected torch.float32, '
                                                   'got torch.int8'):
        checkpoint.load(full, path)
    content['backbone.backbone.conv1.weight'][0, 0, 0, 0] += 1
    with pytest.raises(FingerprintMismatch, match='damaged'):
        checkpoint.load(low, save_model(content, tmp_path / 'damaged.pth'))


def test_models_that_were_cast(file, other_resnet18_file, tmp_path):
    """``model.half()`` keeps the identity of the weights it was built with, or was given since."""
    cfg = prompted_config(file)
    model = trained_model(cfg)
    slim = save_model(model, tmp_path / 'slim.pth')
    full = save_model(checkpoint.full_state_dict(model), tmp_path / 'full.pth')
    half = build_model(prompted_config(other_resnet18_file, trainable=[r'bn1\..*'])).half()
    checkpoint.load(half, full)
    assert torch.equal(half.backbone.backbone.conv1.weight,
                       model.backbone.backbone.conv1.weight.half())
    checkpoint.load(half, slim)
    # A full file of it is whole, and loads anywhere.
    path = save_model(checkpoint.full_state_dict(half), tmp_path / 'half.pth')
    for other in (build_model(cfg), half):
        checkpoint.load(other, path)
        weight = other.backbone.backbone.conv1.weight
        assert torch.equal(weight, model.backbone.backbone.conv1.weight.half().to(weight))


def test_a_file_of_a_model_that_froze_more_is_whole(resnet18_file, tmp_path):
    model = trained_model(prompted_config(resnet18_file))
    path = save_model(checkpoint.full_state_dict(model), tmp_path / 'full.pth')
    other = build_model(prompted_config(resnet18_file, trainable=['layer4.*']))
    checkpoint.load(other, path)
    assert torch.equal(other.head.fc.weight, model.head.fc.weight)
