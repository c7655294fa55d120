import weakref

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from mmprotune.errors import StageError
from mmprotune.models import calls
from mmprotune.models.insertion import find_places
from mmprotune.models.layout import Layout, describe, token_grid
from tests.conftest import RESNET18, build, wake

SWIN = dict(type='SwinTransformer', embed_dims=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8))


@pytest.mark.parametrize('shape, expected', [
    ((2, 256, 16, 24), Layout('NCHW', 256, 4)),
    ((2, 16, 24, 96), Layout('NHWC', 96, 4)),
    ((2, 384, 96), Layout('NLC', 96, 4)),
    ((2, 385, 96), Layout('NLC', 96, 4, extra_tokens=1)),
    ((2, 24 + 5, 96), Layout('NLC', 96, 16, extra_tokens=5)),
    ((2, 64, 17, 25), Layout('NCHW', 64, 4)),  # padded convolutions
    ((32, 49, 96), None),  # windows
    ((2, 96), None),
    ((2, 64, 96, 16), Layout('NHWC', 16, 1)),
])
def test_describe(shape, expected):
    assert describe(torch.zeros(shape), (64, 96), 2) == expected


def test_describe_ignores_integers():
    assert describe(torch.zeros(2, 8, 16, 24, dtype=torch.long), (64, 96), 2) is None


@pytest.mark.parametrize('length, image, stride, extra, grid', [
    (24, (64, 96), 16, 0, (4, 6)),
    (25, (64, 96), 16, 1, (4, 6)),
    (5 * 7, (65, 97), 16, 0, (5, 7)),  # padded up
    (4 * 6, (65, 97), 16, 0, (4, 6)),  # cropped
    (23, (64, 96), 16, 0, None),
    (1, (64, 96), 16, 1, None),
])
def test_token_grid(length, image, stride, extra, grid):
    assert token_grid(length, image, stride, extra) == grid


@pytest.mark.parametrize('cfg, paths, channels, strides', [
    (RESNET18, ['layer1', 'layer2', 'layer3', 'layer4'], [8, 16, 32, 64], [4, 8, 16, 32]),
    (dict(type='ResNet', depth=18, base_channels=8, deep_stem=True, strides=(1, 2, 1, 1),
          dilations=(1, 1, 2, 4)),
     ['layer1', 'layer2', 'layer3', 'layer4'], [8, 16, 32, 64], [4, 8, 8, 8]),
    (dict(type='ResNet', depth=50, base_channels=8, with_cp=True),
     ['layer1', 'layer2', 'layer3', 'layer4'], [32, 64, 128, 256], [4, 8, 16, 32]),
    (dict(type='ResNeXt', depth=50, groups=4, base_width=4),
     ['layer1', 'layer2', 'layer3', 'layer4'], [256, 512, 1024, 2048], [4, 8, 16, 32]),
    (dict(type='RegNet', arch='regnetx_400mf'),
     ['layer1', 'layer2', 'layer3', 'layer4'], [32, 64, 160, 384], [4, 8, 16, 32]),
    (dict(type='Res2Net', depth=50, scales=4, base_width=26),
     ['layer1', 'layer2', 'layer3', 'layer4'], [256, 512, 1024, 2048], [4, 8, 16, 32]),
    (SWIN, ['stages.0.blocks.0', 'stages.1.blocks.1', 'stages.2.blocks.0', 'stages.3.blocks.0'],
     [16, 32, 64, 128], [4, 8, 16, 32]),
    (dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.25, out_indices=(2, 3, 4)),
     ['stage1', 'stage2', 'stage3', 'stage4'], [32, 64, 128, 256], [4, 8, 16, 32]),
])
def test_auto(cfg, paths, channels, strides):
    stages, remarks, _ = find_places(MODELS.build(dict(cfg)))
    assert [s.path for s in stages] == paths
    assert [s.channels for s in stages] == channels
    assert [s.stride for s in stages] == strides
    assert not remarks


def test_a_stage_that_nothing_reads_is_left_out_and_named():
    stages, remarks, _ = find_places(MODELS.build(dict(RESNET18, out_indices=(0, 1, 2))))
    assert [s.path for s in stages] == ['layer1', 'layer2', 'layer3']
    assert len(remarks) == 1
    assert 'layer4 (64 channels)' in remarks[0]


def test_the_dry_run_leaves_no_trace():
    backbone = MODELS.build(dict(RESNET18, norm_eval=False))
    backbone.train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    modes = [m.training for m in backbone.modules()]
    random_state = torch.get_rng_state()
    find_places(backbone)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes == [m.training for m in backbone.modules()] and True in modes
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    assert not any(m._forward_hooks for m in backbone.modules())
    assert all(p.grad is None for p in backbone.parameters())


def test_the_dry_run_holds_no_features():
    """On large images the outputs of all modules, or a graph that keeps them, take gigabytes."""
    backbone = MODELS.build(dict(RESNET18))
    outputs, most = [], 0

    def count(module, args, output):
        nonlocal most
        outputs.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in outputs))

    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    find_places(backbone)
    assert len(outputs) == 20
    assert most <= 3  # of the two paths through a block


def test_paths_by_hand_run_in_order():
    backbone = MODELS.build(dict(RESNET18))
    stages, *_ = find_places(backbone, ['layer3', 'layer1.0'])
    assert [(s.name, s.path, s.channels) for s in stages] == [('stage1', 'layer1.0', 8),
                                                              ('stage2', 'layer3', 32)]


class Flat(nn.Module):
    """A backbone without blocks or feature maps."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


class Broken(nn.Module):

    def forward(self, x):
        raise RuntimeError('only on Sundays')


@pytest.mark.parametrize('backbone, stages, error, match', [
    (lambda: MODELS.build(dict(RESNET18)), ['layer9'], StageError,
     "ResNet has no module 'layer9'.*layer1"),
    (lambda: MODELS.build(dict(RESNET18)), 'layer1', StageError, "'auto' or a list"),
    (lambda: MODELS.build(dict(RESNET18)), [1], TypeError, 'list of module paths'),
    (lambda: MODELS.build(dict(RESNET18)), [], StageError, 'empty list'),
    (Flat, 'auto', StageError, r'no stage was found in Flat; name them with stages=\[…\]'),
    (Flat, ['fc'], StageError, "'fc' of Flat returns no feature map"),
    (Broken, 'auto', StageError, 'Broken ran at none of .*64x96.*RuntimeError: only on Sundays'),
])
def test_errors(backbone, stages, error, match):
    with pytest.raises(error, match=match):
        find_places(backbone(), stages)


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)


@pytest.mark.parametrize('layers, ends', [
    # Each resolution up to its last layer that comes before the next; what only pools ends none.
    ([conv(3, 4), nn.ReLU(inplace=True), conv(4, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
      conv(4, 8), nn.ReLU(), nn.MaxPool2d(2)], [('3', 4, 1), ('6', 8, 2)]),
    # Channels alone start no stage: AlexNet's change inside one resolution.
    ([conv(3, 4, 4), conv(4, 8), conv(8, 6), conv(6, 6, 2)], [('2', 6, 4), ('3', 6, 8)]),
    ([conv(3, 4, 2)], [('0', 4, 2)]),
])
def test_a_plain_stack_of_layers(layers, ends):
    stages, remarks, _ = find_places(nn.Sequential(*layers))
    assert [(s.path, s.channels, s.stride) for s in stages] == ends
    assert not remarks


def test_a_row_of_containers_is_cut_into_four():
    """ConvMixer's layers."""
    row = [nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4)) for _ in range(6)]
    backbone = nn.Sequential()
    backbone.add_module('stem', conv(3, 4, 8))
    backbone.add_module('row', nn.Sequential(*row))
    stages, *_ = find_places(backbone)
    assert [s.path for s in stages] == ['row.1', 'row.2', 'row.4', 'row']
    backbone.out_indices = (1, 3, 5)
    stages, *_ = find_places(backbone)
    assert [s.path for s in stages] == ['row.1', 'row.3', 'row']


def test_a_backbone_for_grey_images():
    stages, *_ = find_places(nn.Sequential(conv(1, 4, 2), nn.ReLU(), conv(4, 8, 2)))
    assert [(s.channels, s.stride) for s in stages] == [(4, 2), (8, 4)]


def test_no_stage_lists_candidates():
    """Nothing but a stem is nothing to end a stage with; by hand it can be."""
    backbone = nn.Sequential()
    backbone.add_module('stem', conv(3, 4, 2))
    backbone.add_module('pool', nn.MaxPool2d(2))
    with pytest.raises(StageError, match='modules that return feature maps: pool, stem'):
        find_places(backbone)
    stages, *_ = find_places(backbone, ['stem', 'pool'])
    assert [(s.channels, s.stride) for s in stages] == [(4, 2), (4, 4)]


CLS_TOKEN_VIT = dict(type='mmpretrain.VisionTransformer', patch_size=16, img_size=64, arch=dict(
    embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96))


@pytest.mark.parametrize('out_type, prompts', [
    ('cls_token', 3), ('featmap', 4), ('avg_featmap', 4), ('raw', 4)])
def test_the_last_prompt_of_a_vit_acts_where_its_pixels_are_returned(out_type, prompts):
    """A class token has seen the pixels of every layer but the last."""
    cfg = dict(type='mmprotune.PromptedBackbone', freeze='all',
               backbone=dict(CLS_TOKEN_VIT, out_type=out_type))
    model = build(cfg)
    assert [s.path for s in model.stages] == [f'layers.{i}' for i in range(prompts)]
    wake(model)
    sum(t.square().mean() for t in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.prompts.parameters())
    if prompts == 4:
        serial = build(dict(cfg, last_stage='serial')).eval()
        with torch.no_grad():
            one, other = (serial(torch.randn(1, 3, 64, 64))[0] for _ in range(2))
        assert not torch.equal(one, other)


def test_serial_where_no_output_depends_on_the_last_prompt():
    with pytest.raises(ValueError, match=r"last_stage='serial' .* no output of VisionTransformer "
                       r"depends on it \(no prompt at layers.3 \(48 channels\).*backbone.out_type"):
        build(dict(type='mmprotune.PromptedBackbone', freeze='all', last_stage='serial',
                   backbone=dict(CLS_TOKEN_VIT, out_type='cls_token')))


def test_a_class_token_passes_a_serial_last_stage():
    model = build(dict(type='mmprotune.PromptedBackbone', freeze='all', last_stage='serial',
                       backbone=dict(CLS_TOKEN_VIT, out_type='raw', final_norm=False))).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens, = model(x)
        with calls.opened(model, calls.Call((64, 64), plain=True)):
            plain, = model(x)
    torch.testing.assert_close(tokens[:, 0], plain[:, 0])
    assert not torch.allclose(tokens[:, 1:], plain[:, 1:])
