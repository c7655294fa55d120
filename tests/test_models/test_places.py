"""Where prompts go: `insert` and `stem`."""
import copy
from collections import namedtuple

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import DefaultScope
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmprotune import PromptedBackbone
from mmprotune.errors import IncompleteCheckpoint, StageError
from mmprotune.lean import restore
from mmprotune.lean.memory import KeptBytes
from mmprotune.models.insertion import find_places
from tests.conftest import RESNET18, build, wake
from tests.test_models.test_insertion import SWIN
from tests.test_models.test_layouts import HRNET, VIT

RESNET50 = dict(
    type='ResNet', depth=50, base_channels=8, norm_eval=True, zero_init_residual=False)
VGG = dict(type='mmpretrain.VGG', depth=11, num_classes=-1)
CONVNEXT = dict(
    type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 32, 64]),
    out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


def host(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(copy.deepcopy(cfg)).requires_grad_(False)


def paths(cfg, insert, **kwargs):
    places, *_ = find_places(host(cfg), insert=insert, **kwargs)
    return [place.path for place in places]


@pytest.mark.parametrize('cfg, insert, count, first, last', [
    (RESNET18, 'blocks', 8, 'layer1.0', 'layer4.1'),
    (RESNET18, 'branches', 8, 'layer1.0.bn2', 'layer4.1.bn2'),
    (RESNET18, 'narrow', 8, 'layer1.0.bn2', 'layer4.1.bn2'),  # all of a block is as narrow
    (RESNET50, 'blocks', 16, 'layer1.0', 'layer4.2'),
    (RESNET50, 'branches', 16, 'layer1.0.bn3', 'layer4.2.bn3'),
    (RESNET50, 'narrow', 16, 'layer1.0.bn2', 'layer4.2.bn2'),
    (dict(RESNET50, with_cp=True), 'narrow', 16, 'layer1.0.bn2', 'layer4.2.bn2'),
    # Its 3x3 convolutions each see a part of the narrow map, so that only all of it is a place.
    (dict(type='Res2Net', depth=50, scales=4, base_width=26), 'narrow', 16, 'layer1.0.bn1',
     'layer4.2.bn1'),
    (dict(type='RegNet', arch='regnetx_400mf'), 'narrow', 22, 'layer1.0.bn3', 'layer4.11.bn3'),
    # Blocks that change width have no residual connection.
    (dict(type='mmpretrain.MobileNetV2'), 'branches', 10, 'layer2.1.conv', 'layer6.2.conv'),
    (dict(type='mmpretrain.MobileNetV2'), 'blocks', 17, 'layer1.0', 'layer7.0'),
    (SWIN, 'blocks', 5, 'stages.0.blocks.0', 'stages.3.blocks.0'),
    (SWIN, 'branches', 10, 'stages.0.blocks.0.attn', 'stages.3.blocks.0.ffn.layers'),
    (VIT, 'blocks', 4, 'layers.0', 'layers.3'),
    (VIT, 'branches', 8, 'layers.0.attn.proj_drop', 'layers.3.ffn.layers'),
    (CONVNEXT, 'branches', 5, 'stages.0.0.drop_path', 'stages.3.0.drop_path'),
    (HRNET, 'branches', None, 'layer1.0.bn3', None),
    (dict(type='mmpretrain.ConvMixer', arch=dict(embed_dims=8, depth=3, patch_size=4,
                                                  kernel_size=3)), 'blocks', 3, 'stages.0',
     'stages.2'),
    (RESNET18, 'outputs', 4, '', ''),
    (RESNET50, 'auto', 16, 'layer1.0.bn2', 'layer4.2.bn2'),
    (SWIN, 'auto', 10, 'stages.0.blocks.0.attn', 'stages.3.blocks.0.ffn.layers'),
    (VGG, 'auto', None, 'features.0', None),  # has no branches
], ids=lambda value: value.get('type') if isinstance(value, dict) else None)
def test_places(cfg, insert, count, first, last):
    found = paths(cfg, insert)
    if cfg['type'] == 'Res2Net':  # where a block strides, its narrow map is larger than its end
        assert 'layer2.0.bn3' in found
    assert found[0] == first and (last is None or found[-1] == last)
    assert count is None or len(found) == count
    assert insert == 'outputs' or len(set(found)) == len(found)


@pytest.mark.parametrize('cfg, stem', [
    (RESNET50, 'maxpool'), (SWIN, 'patch_embed.norm'), (VIT, 'drop_after_pos'),
    (CONVNEXT, 'downsample_layers.0')], ids=lambda value: value['type'] if isinstance(
        value, dict) else value)
def test_behind_the_stem(cfg, stem):
    places, *_ = find_places(host(cfg), insert='blocks', stem=True)
    assert (places[0].name, places[0].path) == ('stem', stem)
    assert [place.name for place in places[1:3]] == ['block1', 'block2']


class Adds(nn.Module):
    """One addition after a stem."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.part = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = self.stem(x)
        if self.kind == 'residual':
            return x + self.left(x).relu()
        if self.kind == 'in place':
            y = self.left(x)
            y += x
            return y
        if self.kind == 'projection':
            return self.right(x) + self.right2(self.left(x))
        if self.kind == 'parallel':
            return self.right(x) + self.left(x)
        if self.kind == 'scaled':
            return x + self.scale.view(-1, 1, 1) * self.left(x)
        if self.kind == 'split':
            first, second = x.chunk(2, 1)
            return second + self.part(first)
        return self.left(x) + 1


@pytest.mark.parametrize('kind, place', [
    ('residual', 'left'), ('in place', 'left'), ('projection', 'right2'), ('parallel', None),
    ('scaled', 'left'), ('split', None), ('constant', None)])
def test_which_additions_are_residual(kind, place):
    net = Adds(kind)
    net.right2 = nn.Conv2d(8, 8, 1)
    if place is None:
        with pytest.raises(StageError, match="insert='branches': no residual branch .*'blocks'"):
            find_places(net, insert='branches')
    else:
        places, *_ = find_places(net, insert='branches')
        assert [(p.name, p.path) for p in places] == [('branch1', place)]


class Sums(nn.Module):
    """Two branches of one tensor, which is added to both at once; and a class token."""

    def __init__(self, add):
        super().__init__()
        self.add = add
        self.stem = nn.Conv2d(3, 8, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            block.norm = nn.LayerNorm(8)
            block.left = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
            block.right = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            self.blocks.append(block)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            y = block.norm(x)
            x = self.add(x, block.left(y), block.right(y))
        return x


@pytest.mark.parametrize('add', [
    lambda x, a, b: x + a + b, lambda x, a, b: x + (a + b), lambda x, a, b: a + b + x,
    lambda x, a, b: (x + a).add_(b)])
def test_every_branch_of_a_sum(add):
    places, *_ = find_places(Sums(add), insert='branches')
    assert [place.path for place in places] == [
        'blocks.0.left', 'blocks.0.right', 'blocks.1.left', 'blocks.1.right']


Named = namedtuple('Named', 'tokens pixels')


class ReturnsNamed(Sums):

    def forward(self, x):
        x = super().forward(x)
        return Named(x[:, 0], x)


def test_outputs_keep_their_type():
    net = ReturnsNamed(lambda x, a, b: x + a + b)
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = net(x)
        model = PromptedBackbone(net, insert='outputs')
        found = model(x)
    assert [(stage.name, stage.index) for stage in model.stages] == [('output1', 1)]
    assert type(found) is Named
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    wake(model)
    assert not torch.equal(model(x).pixels, expected.pixels)


class Squeezing(nn.Module):
    """A block whose branch is a row of layers, one of which has two convolutions itself."""

    def __init__(self):
        super().__init__()
        squeeze = nn.Module()
        squeeze.first, squeeze.second = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        squeeze.forward = lambda x: x * squeeze.second(squeeze.first(x.mean((2, 3), True)))
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), squeeze, nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return x + self.branch(x)


def test_a_layer_of_a_block_is_no_block():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(Squeezing(), Squeezing()))
    places, *_ = find_places(net, insert='blocks', stem=True)
    assert [(place.name, place.path) for place in places] == [
        ('stem', '0'), ('block1', '1.0'), ('block2', '1.1')]


class LongSkip(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, 2, 1), Squeezing()
        self.branch = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.block(x)
        return y + self.branch(y) + x


def test_what_a_branch_starts_from_is_none_itself():
    places, *_ = find_places(LongSkip(), insert='branches')
    assert [place.path for place in places] == ['block.branch', 'branch']


class Hooked(nn.Module):
    """Returns what hooks on its layers saw, as extractors of features do."""

    def __init__(self):
        super().__init__()
        self.body = host(RESNET18)
        self.seen = {}
        for name in ('layer2', 'layer4'):
            self.body.get_submodule(name).register_forward_hook(
                lambda module, args, y, name=name: self.seen.__setitem__(name, y))

    def forward(self, x):
        self.body(x)
        return tuple(self.seen.values())


def test_hooks_of_a_backbone_see_the_prompts():
    model = PromptedBackbone(Hooked())
    assert len(model.stages) == 4
    wake(model)
    sum(feature.square().mean() for feature in model(torch.randn(2, 3, 64, 96))).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.prompts.parameters())


def test_outputs_further_inside_are_named():
    net = Sums(lambda x, a, b: x + a + b)
    run = net.forward
    net.forward = lambda images: (run(images), dict(again=run(images)))
    places, remarks, _ = find_places(net, insert='outputs')
    assert [place.name for place in places] == ['output0']
    assert 'no prompt at 1 of the features that Sums returns' in remarks[0]
    net.forward = lambda images: dict(only=run(images))
    with pytest.raises(StageError, match='no feature map is returned as it is, or in a tuple or '):
        find_places(net, insert='outputs')


class Twice(nn.Module):
    """Its second stage is one block that runs twice."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
                  nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))]
        self.first, self.shared = map(Block, blocks)

    def forward(self, x):
        return self.shared(self.shared(self.first(x)))


class Block(nn.Module):

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return self.layers(x)


def test_modules_that_run_twice_are_named():
    places, remarks, _ = find_places(Twice(), insert='blocks')
    assert [place.path for place in places] == ['first']
    assert remarks == ['no prompt in shared: Twice runs them more than once']
    with pytest.raises(StageError, match=r"'shared' of Twice runs more than once; .* first"):
        find_places(Twice(), ['first', 'shared'])
    # A shared activation is none of them.
    assert not find_places(host(RESNET18), insert='blocks')[1]


def test_what_reentrant_checkpointing_hides():
    net = host(RESNET18)
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        run = layer.forward
        layer.forward = lambda x, run=run: checkpoint(run, x, use_reentrant=True)
    for insert in ('blocks', 'narrow'):
        with pytest.raises(StageError, match='under reentrant activation checkpointing.*=False$'):
            find_places(net, insert=insert)
    assert not find_places(net, insert='stages')[1]  # their ends are in the graph


def test_by_hand_comes_before_auto():
    places, *_ = find_places(host(RESNET18), ['layer1'], insert='auto')
    assert [(place.name, place.path) for place in places] == [('stage1', 'layer1')]


def test_patterns_by_hand():
    assert len(paths(RESNET50, 'stages', stages=['layer*.*.bn3'])) == 16
    assert paths(RESNET50, 'stages', stages=['layer2.*', 'layer1.0']) == [
        'layer1.0', 'layer2.0', 'layer2.1', 'layer2.2', 'layer2.3']
    with pytest.raises(StageError, match=r"has no module 'layer\*.bn3'"):  # a star is one name
        paths(RESNET50, 'stages', stages=['layer*.bn3'])


@pytest.mark.parametrize('cfg, options, error, match', [
    (RESNET18, dict(insert='block'), ValueError, "insert must be one of .*'blocks'.*got 'block'"),
    (RESNET18, dict(insert='blocks', last_stage='serial'), ValueError, 'prompts at stage ends'),
    (RESNET18, dict(insert='auto', last_stage='none'), ValueError, "which is 'narrow' here"),
    (RESNET18, dict(insert='blocks', stages=['layer1']), ValueError, 'stages names the places'),
    (VGG, dict(insert='narrow'), StageError,
     "insert='narrow': no residual branch was found in VGG; others are 'stages'"),
    (VGG, dict(stem=True), StageError, 'stem: '),
    (dict(type='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=64),
     dict(insert='outputs'), StageError,
     "insert='outputs': no feature map is returned"),
    (dict(type='mmseg.DDRNet', in_channels=3, channels=8, ppm_channels=16,
          norm_cfg=dict(type='BN')), dict(insert='outputs'), StageError,
     "insert='outputs': DDRNet returns other outputs in training"),
], ids=lambda value: value.get('type') if isinstance(value, dict) else None)
def test_what_does_not_fit(cfg, options, error, match):
    with pytest.raises(error, match=match):
        build(dict(type='mmprotune.PromptedBackbone', backbone=cfg, freeze='all', **options))


def gradients(model, x):
    model.zero_grad()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs, )
    sum((o.sin() * (i + 1)).sum() for i, o in enumerate(outputs)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('insert', ['blocks', 'branches', 'narrow', 'outputs'])
@pytest.mark.parametrize('cfg', [RESNET50, SWIN, VIT, CONVNEXT], ids=lambda cfg: cfg['type'])
def test_gradients_are_exact(cfg, insert):
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build(dict(type='mmprotune.PromptedBackbone', backbone=cfg, freeze='all',
                           insert=insert, stem=insert == 'narrow'))
    wake(model)
    model.double().train()
    ordinary = copy.deepcopy(model)
    restore(ordinary)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    found, exact = gradients(model, x), gradients(ordinary, x)
    assert len(exact) > 6 * len(model.prompts) - 1 and all(g.any() for g in exact.values())
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def test_no_graph_goes_through_the_backbone_of_prompts_on_its_outputs():
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
                       insert='outputs')).train()
    assert list(model.prompts) == ['output0', 'output1', 'output2', 'output3']
    wake(model)
    seen = []
    for module in model.backbone.modules():
        if module is not model.backbone:
            module.register_forward_hook(lambda m, args, y: seen.append(y.requires_grad))
    x = torch.randn(1, 3, 64, 64)
    with KeptBytes(model) as kept:
        outputs = model(x)
        by_module = kept.by_module()
    assert len(seen) > 40 and not any(seen)
    assert all(y.requires_grad for y in outputs)
    assert by_module and all(path.startswith('prompts.') for path in by_module)
    with model.without_prompts():
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(model(x), outputs))


def test_narrow_prompts_keep_less_than_those_at_block_ends():
    kept = {}
    for insert in ('blocks', 'narrow'):
        model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET50, freeze='all',
                           insert=insert)).train()
        with KeptBytes(model) as bytes_:
            outputs = model(torch.randn(1, 3, 128, 128))
            kept[insert] = bytes_.total()
        del outputs
    assert kept['narrow'] < 0.4 * kept['blocks']


@pytest.mark.parametrize('insert', ['blocks', 'branches', 'narrow', 'outputs'])
def test_a_slim_checkpoint_belongs_to_its_places(insert):
    def made(**options):
        model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET50, freeze='all',
                           **options))
        wake(model)
        return model

    model, twin = made(insert=insert), made(insert=insert)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, model.eval()(x), twin.eval()(x)))
    with pytest.raises(IncompleteCheckpoint, match=f"set insert=.*'{insert}'"):
        made(insert='stages').load_state_dict(model.state_dict())
