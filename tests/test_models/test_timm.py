"""The door to timm: DINOv2, DINOv3, EVA and the rest, through the hosts' TIMMBackbone."""
import pytest
import torch
from mmengine.registry import DefaultScope

from mmprotune import PromptedBackbone
from tests.conftest import build, wake

pytest.importorskip('timm')

SMALL = dict(depth=4, embed_dim=48, num_heads=3)
# Class and register tokens, patches of 14, rotary positions, one size only; name, arguments, image
# size, layout, stride, tokens that are no patches.
MODELS = [
    ('vit_small_patch14_reg4_dinov2', dict(SMALL, img_size=56), (56, 56), 'NLC', 14, 5),
    ('vit_small_patch14_reg4_dinov2', dict(SMALL, dynamic_img_size=True), (56, 84), 'NLC', 14, 5),
    ('vit_small_patch16_dinov3', dict(SMALL, img_size=64), (64, 96), 'NLC', 16, 5),
    ('eva02_tiny_patch14_224', dict(SMALL, img_size=56), (56, 56), 'NLC', 14, 1),
    ('swin_tiny_patch4_window7_224', dict(img_size=56, embed_dim=24), (56, 56), 'NHWC', 4, 0),
    ('convnext_atto', {}, (64, 96), 'NCHW', 4, 0),
]


@pytest.mark.parametrize('name, arguments, size, layout, stride, extra', MODELS)
@pytest.mark.parametrize('host', ['mmpretrain', 'mmseg'])
def test_timm(host, name, arguments, size, layout, stride, extra):
    if host == 'mmseg':
        arguments = dict(arguments, features_only=True, pretrained=False)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(host):
        model = build(dict(
            type='mmprotune.PromptedBackbone', freeze='all',
            backbone=dict(type=f'{host}.TIMMBackbone', model_name=name, **arguments))).eval()
    assert len(model.stages) == 4
    first = model.stages[0].layout
    assert (first.kind, first.stride, first.extra_tokens) == (layout, stride, extra)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        with model.without_prompts():
            expected = model(x)
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected))
        wake(model)
        assert all(not torch.equal(a, b) for a, b in zip(model(x), expected))
    sum(feature.square().mean() for feature in model.train()(x)).backward()
    assert all(p.grad is not None for p in model.prompts.parameters())
    assert all(p.grad is None for p in model.backbone.parameters())


def test_norms_that_ask_for_the_mode_keep_their_statistics():
    """timm's fuse a norm and its activation, in a ``forward`` of their own."""
    import timm
    torch.manual_seed(0)
    net = timm.create_model('efficientnet_lite0', features_only=True)
    assert any(type(module).__name__ == 'BatchNormAct2d' for module in net.modules())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = PromptedBackbone(net, lean=False)
    assert not model.names_with_mode
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_local_file_of_timms_own(tmp_path):
    """As docs/foundation_models.md names one: what it fills is frozen, and prompts stand on it."""
    import timm
    arguments = dict(SMALL, img_size=56)
    torch.manual_seed(1)
    donor = timm.create_model('vit_small_patch14_reg4_dinov2', **arguments)
    torch.save(donor.state_dict(), tmp_path / 'dinov2.pth')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = build(dict(type='mmprotune.PromptedBackbone', backbone=dict(
            type='mmseg.TIMMBackbone', model_name='vit_small_patch14_reg4_dinov2',
            features_only=True, out_indices=(0, 1, 2, 3), pretrained=True,
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'dinov2.pth')), **arguments)))
    frozen = model.frozen_tensors()
    expected = donor.state_dict()
    found = [name for name in frozen if name.partition('model.model.')[2] in expected]
    assert len(found) > 50
    for name in found:
        assert torch.equal(frozen[name], expected[name.partition('model.model.')[2]]), name
    assert len(model.prompts) == 4
