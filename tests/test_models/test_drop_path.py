"""Drop path in the frozen layers, where a config asks for it."""
import pytest
import torch
import torchvision
from torchvision.models.convnext import CNBlockConfig

from mmprotune import FrozenSnapshot, audit
from mmprotune.errors import FrozenTensorsChanged
from mmprotune.models.modes import drop_paths
from tests.conftest import build, wake
from tests.test_models.test_insertion import SWIN

CONVNEXT = dict(type='mmpretrain.ConvNeXt', layer_scale_init_value=1., out_indices=(0, 1, 2, 3),
                gap_before_final_norm=False,
                arch=dict(depths=[2, 2, 2, 2], channels=[8, 16, 32, 64]))
BACKBONES = pytest.mark.parametrize(
    'backbone', [dict(SWIN, drop_path_rate=0.5), dict(CONVNEXT, drop_path_rate=0.5)],
    ids=['swin', 'convnext'])


def prompted(backbone: dict, **options):
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                       drop_path=True, **options))
    wake(model)
    return model


def outputs(model, seed: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    torch.manual_seed(seed)
    return model(images)


def loss(features):
    generator = torch.Generator().manual_seed(1)
    return sum((o * torch.randn(o.shape, generator=generator)).mean() for o in features)


def differ(model) -> bool:
    first, second = outputs(model, 1), outputs(model, 2)
    return not all(torch.equal(a, b) for a, b in zip(first, second))


@BACKBONES
def test_branches_are_dropped_in_training_only(backbone):
    model = prompted(backbone).train()
    assert differ(model)
    audit(model, training=True)
    model.eval()
    assert not differ(model)
    audit(model)
    # In eval mode it is the network without the option.
    torch.manual_seed(0)
    plain = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all'))
    wake(plain)
    assert not differ(plain.train())
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, 1), outputs(plain, 1)))
    # All else that is frozen stays in eval mode.
    names = {n for n, m in model.train().backbone.named_modules() if m.training}
    assert names == drop_paths(model.backbone) and names


@BACKBONES
def test_steps_move_nothing_frozen(backbone):
    model = prompted(backbone).train()
    snapshot = FrozenSnapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        loss(outputs(model, seed)).backward()
        optimizer.step()
    audit(model, snapshot, training=True)
    # What is not drop path is still watched.
    model.backbone.train()
    with pytest.raises(FrozenTensorsChanged, match='is frozen, but in training mode'):
        audit(model)


@BACKBONES
@pytest.mark.parametrize('lean', [True, dict(recompute=1.)])
def test_lean_layers_have_the_same_gradients(backbone, lean):
    """Of a pass in which the same branches were dropped."""
    found = []
    for option in (False, lean):
        model = prompted(backbone, lean=option).train()
        loss(outputs(model, 1)).backward()
        found.append([p.grad for p in model.prompts.parameters()])
    assert any(grad.abs().max() > 1e-4 for grad in found[0])
    for expected, got in zip(*found):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('backbone', [dict(SWIN, drop_path_rate=0.), dict(type='ResNet', depth=18)])
def test_a_backbone_without_drop_path_is_refused(backbone):
    with pytest.raises(ValueError, match=r'drop_path=True, but \w+ has no drop path, .*'
                       r'model\.backbone\.backbone\.drop_path_rate'):
        prompted(backbone)


def test_a_rate_is_no_switch():
    with pytest.raises(TypeError, match=r'drop_path must be True or False .* got 0\.2'):
        build(dict(type='mmprotune.PromptedBackbone', backbone=SWIN, freeze='all', drop_path=0.2))


def test_torchvisions_name_for_it():
    net = torchvision.models.ConvNeXt(
        [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], stochastic_depth_prob=0.5)
    # The first block's rate is 0.
    assert len(drop_paths(net)) == 3
    assert all(name.endswith('stochastic_depth') for name in drop_paths(net))
