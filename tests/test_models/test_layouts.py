"""Prompts on every layout: maps, channels last, tokens with and without extra ones, branches."""
import copy

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from mmprotune.models import calls
from tests.conftest import RESNET18, build, wake
from tests.test_models.test_insertion import SWIN

VIT = dict(type='mmseg.VisionTransformer', img_size=(64, 64), patch_size=16, embed_dims=32,
           num_layers=4, num_heads=2, out_indices=(0, 1, 3), with_cls_token=True, final_norm=False)
HRNET = dict(
    type='mmdet.HRNet', extra={
        f'stage{i}': dict(num_modules=2 if i == 3 else 1, num_branches=i,
                          block='BOTTLENECK' if i == 1 else 'BASIC', num_blocks=(1, ) * i,
                          num_channels=(64, ) if i == 1 else tuple(8 * 2**j for j in range(i)))
        for i in range(1, 5)})


def prompted(backbone, **options):
    return build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                      **options)).eval()


class Block(nn.Module):

    def __init__(self, channels):
        super().__init__()
        self.first, self.second = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


@ROOT_MODELS.register_module(force=True)
class ToyTokens(BaseModule):
    """Patches of 16 px, ``extra`` leading tokens, features in a dict; strict about sizes or not."""

    def __init__(self, extra=0, channels_last=False, channels=8, init_cfg=None):
        super().__init__(init_cfg)
        self.patches = nn.Conv2d(3, channels, 16, stride=16)
        self.extra, self.channels_last = extra, channels_last
        self.blocks = nn.ModuleList(Block(channels) for _ in range(4))

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        if not self.channels_last:
            x = x.flatten(1, 2)
            x = torch.cat([x.new_ones(len(x), self.extra, x.size(2)), x], dim=1)
        outs = {}
        for i, block in enumerate(self.blocks):
            outs[f'block{i}'] = x = block(x)
        return outs


@pytest.mark.parametrize('extra', [0, 1, 5])
def test_tokens_by_hand(extra):
    """Extra tokens pass through untouched; the rest are prompted as a map."""
    model = prompted(dict(type='ToyTokens', extra=extra))
    assert [(s.layout.kind, s.layout.extra_tokens) for s in model.stages] == [('NLC', extra)] * 4
    wake(model)
    x, net = torch.randn(2, 3, 48, 80), copy.deepcopy(model).unwrap()
    with torch.no_grad():
        outs = model(x)
        tokens = net(x)['block0']
        grid = tokens[:, extra:].transpose(1, 2).reshape(2, 8, 3, 5)
        prompt = model.prompts['stage1'](grid).flatten(2).transpose(1, 2)
        expected = torch.cat([tokens[:, :extra], tokens[:, extra:] + prompt], dim=1)
    torch.testing.assert_close(outs['block0'], expected)
    assert torch.equal(outs['block0'][:, :extra], tokens[:, :extra])


def test_channels_last_by_hand():
    model = prompted(dict(type='ToyTokens', channels_last=True))
    assert {s.layout.kind for s in model.stages} == {'NHWC'}
    wake(model)
    net = copy.deepcopy(model).unwrap()
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        plain = net(x)['block0']
        prompt = model.prompts['stage1'](plain.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(model(x)['block0'], plain + prompt)


def test_tokens_that_fit_no_grid():
    model = prompted(dict(type='ToyTokens'))
    message = (r'ToyTokens\.blocks\.0: 17 tokens with 0 extra ones fit no grid of stride 16 on '
               r'images of \[\(48, 80\)\].*shape \(1, 17, 8\)')
    with calls.opened(model, calls.Call((48, 80))), pytest.raises(ValueError, match=message):
        model.apply_prompt(model.stages[0], torch.zeros(1, 17, 8))


def test_plain_vit_is_cut_at_its_out_indices_else_into_four():
    assert [s.path for s in prompted(VIT).stages] == ['layers.0', 'layers.1', 'layers.3']
    deep = dict(VIT, num_layers=6, out_indices=5)
    assert [s.path for s in prompted(deep).stages] == ['layers.1', 'layers.2', 'layers.4',
                                                       'layers.5']
    assert {s.layout.extra_tokens for s in prompted(VIT).stages} == {1}


def test_branches_get_a_prompt_each_at_the_end_of_a_stage():
    model = prompted(HRNET)
    assert [(s.name, s.path, s.index) for s in model.stages] == [
        ('stage1', 'layer1', None), ('stage2_0', 'stage2', 0), ('stage2_1', 'stage2', 1),
        *((f'stage3_{i}', 'stage3', i) for i in range(3)),
        *((f'stage4_{i}', 'stage4', i) for i in range(4))]
    assert [s.stride for s in model.stages[-4:]] == [4, 8, 16, 32]


@pytest.mark.parametrize('backbone, size', [
    (backbone, size) for backbone in (VIT, HRNET, SWIN)
    for size in ((64, 64), (96, 128), (80, 112))
    if backbone is not HRNET or size[0] % 32 == 0  # HRNet itself takes multiples of 32 only
], ids=lambda value: value['type'] if isinstance(value, dict) else f'{value[0]}x{value[1]}')
def test_sizes_change_from_batch_to_batch(backbone, size):
    model = prompted(backbone, lean=dict(rounds=False))
    x = torch.randn(2, 3, *size)
    net = copy.deepcopy(model).unwrap()
    with torch.no_grad():
        expected = net(x)
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected))
        wake(model)
        assert all(a.shape == b.shape and not torch.equal(a, b)
                   for a, b in zip(model(x), expected))


@pytest.mark.parametrize('backbone', [dict(RESNET18, norm_eval=False), SWIN],
                         ids=lambda c: c['type'])
@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
def test_activation_checkpointing_of_the_host(backbone):
    gradients = []
    for with_cp in (False, True):
        model = prompted(dict(backbone, with_cp=with_cp)).train()
        wake(model)
        torch.manual_seed(1)
        sum(f.square().mean() for f in model(torch.randn(2, 3, 64, 64))).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(g is not None for g in gradients[1].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('backbone', [RESNET18, SWIN, VIT], ids=lambda c: c['type'])
def test_half_precision(backbone, autocast):
    if backbone is SWIN and not autocast:
        pytest.skip('the attention mask of mmdet.SwinTransformer is float32 always')
    model = prompted(backbone)
    wake(model)
    x = torch.randn(1, 3, 64, 64)
    if autocast:
        with torch.autocast('cpu', torch.bfloat16):
            outs = model(x)
    else:
        outs = model.to(torch.bfloat16)(x.to(torch.bfloat16))
        assert {f.dtype for f in outs} == {torch.bfloat16}
    sum(f.float().sum() for f in outs).backward()
    assert all(p.grad.isfinite().all() for p in model.prompts.parameters())
