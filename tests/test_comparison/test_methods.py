"""The shipped methods, and what their files may hold."""
from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from mmprotune.comparison.methods import PARTS, apply_method, parts_of, read_method
from mmprotune.config_nodes import type_name
from mmprotune.errors import LaunchError

from ..classification import classifier_cfg
from ..conftest import RESNET18, build

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'methods'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
VIT = dict(type='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=32, patch_size=16,
           out_type='featmap', out_indices=(2, 5, 8, 11))


def classifier(backbone: dict, file: str | None) -> Config:
    init_cfg = dict(type='Pretrained', checkpoint=file) if file else None
    model = classifier_cfg(dict(backbone, init_cfg=init_cfg))
    model['head']['in_channels'] = 192 if backbone is VIT else 64
    return Config(dict(
        default_scope='mmpretrain', model=model,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3))))


@pytest.fixture(scope='module')
def vit_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('vit') / 'vit.pth'
    torch.save(build(VIT).state_dict(), path)
    return str(path)


def trained(cfg: Config) -> set[str]:
    model = build(cfg.model)
    model.train()
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('name', NAMES)
def test_every_method_trains_the_head_and_its_own(name, resnet18_file, vit_file):
    full = trained(classifier(RESNET18, resnet18_file))
    on_vit = name in ('lora', 'qkv')
    cfg = classifier(*((VIT, vit_file) if on_vit else (RESNET18, resnet18_file)))
    names = trained(apply_method(cfg, read_method(name, FOLDER)))
    assert {'head.fc.weight', 'head.fc.bias'} <= names
    own = {name for name in names if not name.startswith('head.')}
    old = {name.replace('backbone.backbone.', 'backbone.') for name in own}
    if name in ('full', 'full_slow'):
        assert names == full
    elif name == 'head':
        assert own == set()
    elif name == 'bitfit':
        assert old == {n for n in full if n.startswith('backbone') and n.endswith('.bias')}
    elif name == 'norm':
        assert old == {n for n in full if n.startswith('backbone')
                       and ('.bn' in n or '.downsample.1.' in n)}
    elif name == 'partial1':
        assert old == {n for n in full if n.startswith('backbone.layer4')}
    elif name == 'branches_early':
        assert {n for n in own if not n.startswith('backbone.prompts.')} == {
            f'backbone.{n}' for n in full
            if n.startswith(('backbone.conv1', 'backbone.bn1', 'backbone.layer1'))}
        assert any(n.startswith('backbone.prompts.') for n in own)
    elif name == 'lora':
        assert own and all('.lora_' in n for n in own)
        assert len(own) == 12 * 2 * 2  # blocks, layers, factors
    else:
        assert own and all(n.startswith('backbone.prompts.') for n in own)


def test_a_file_without_places_means_those_of_the_class(resnet18_file, tmp_path):
    """Not those that --protune has for the library."""
    (tmp_path / 'mine.py').write_text("backbone = dict(type='mmprotune.PromptedBackbone')")
    cfg = apply_method(classifier(RESNET18, resnet18_file), read_method('mine', tmp_path))
    assert list(build(cfg.model).backbone.prompts) == ['stage1', 'stage2', 'stage3', 'stage4']


def test_the_last_stage_of_a_plain_stack_is_its_last_quarter():
    names = parts_of(build(VIT), 'last_stage', 'partial1')
    assert {name.split('.')[1] for name in names if name.startswith('layers.')} == {
        '9', '10', '11'}
    assert not any(name.startswith(('patch_embed', 'pos_embed', 'cls_token')) for name in names)


def test_the_first_stage_of_a_plain_stack_is_its_first_quarter_and_what_is_before():
    backbone = build(VIT)
    names = parts_of(backbone, 'first_stage', 'x')
    assert {name.split('.')[1] for name in names if name.startswith('layers.')} == {'0', '1', '2'}
    others = {name.split('.')[0] for name in names} - {'layers'}
    assert others == {'cls_token', 'pos_embed', 'patch_embed'}


def test_early_filters_train_at_a_tenth_of_the_rate(resnet18_file):
    cfg = apply_method(classifier(RESNET18, resnet18_file), read_method('branches_early', FOLDER))
    model = build(cfg.model)
    rates = {}
    for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
        rates.update({id(param): group['lr'] for param in group['params']})
    for name, param in model.named_parameters():
        if param.requires_grad:
            early = name.startswith('backbone.backbone.')
            assert rates[id(param)] == pytest.approx(1e-4 if early else 1e-3), name


def test_lora_trains_at_the_optimizers_rate(vit_file):
    """What a config says of the backbone is for weights that were trained before."""
    cfg = classifier(VIT, vit_file)
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=dict(backbone=dict(lr_mult=0.1)))
    apply_method(cfg, read_method('lora', FOLDER))
    groups = build_optim_wrapper(build(cfg.model), cfg.optim_wrapper).optimizer.param_groups
    assert {group['lr'] for group in groups} == {1e-3}


@pytest.mark.parametrize('constructor, paramwise_cfg', [
    ('mmseg.LearningRateDecayOptimizerConstructor',
     dict(decay_rate=0.9, decay_type='stage_wise', num_layers=6)),
    ('mmpretrain.LearningRateDecayOptimWrapperConstructor',
     dict(layer_decay_rate=0.65, custom_keys={'.ln': dict(decay_mult=0.)}))])
def test_rates_where_the_config_lets_them_fall_with_the_depth(
        constructor, paramwise_cfg, resnet18_file):
    cfg = classifier(RESNET18, resnet18_file)
    cfg.optim_wrapper.update(constructor=constructor, paramwise_cfg=paramwise_cfg)
    cfg.optim_wrapper.optimizer.weight_decay = 0.05
    early = apply_method(copy.deepcopy(cfg), read_method('branches_early', FOLDER))
    model = build(early.model)
    rate = next(group['lr'] for group in
                build_optim_wrapper(model, early.optim_wrapper).optimizer.param_groups
                if group['params'][0] is model.backbone.backbone.conv1.weight)
    assert rate == pytest.approx(1e-4)
    with pytest.raises(LaunchError, match='full_slow: optim_wrapper.constructor=.* reads no lr_'):
        apply_method(cfg, read_method('full_slow', FOLDER))


@pytest.mark.parametrize('part', PARTS)
def test_a_backbone_without_such_a_part(part):
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1, bias=False))
    with pytest.raises(LaunchError, match=f'x: Sequential has (no {part}|one stage)'):
        parts_of(plain, part, 'x')


def test_what_lora_cannot_adapt_is_refused(resnet18_file, vit_file):
    lora = read_method('lora', FOLDER)
    with pytest.raises(LaunchError, match='lora: adapts linear layers .* ResNet has none'):
        apply_method(classifier(RESNET18, resnet18_file), lora)
    cfg = classifier(VIT, None)
    cfg.load_from = vit_file
    with pytest.raises(LaunchError, match='lora: load_from='):
        apply_method(cfg, lora)


def test_other_keys_are_merged_into_the_config(tmp_path, resnet18_file):
    file = tmp_path / 'own.py'
    file.write_text(
        "backbone = dict(type='mmprotune.PromptedBackbone')\nlr_scale = 3\n"
        "optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'prompts': dict(lr_mult=4.)}))\n")
    method = read_method(str(file), FOLDER)
    assert (method.name, method.lr_scale) == ('own', 3)
    cfg = apply_method(classifier(RESNET18, resnet18_file), method)
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys['prompts'].lr_mult == 4
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert type_name(cfg.model.backbone) == 'PromptedBackbone'
    assert 'lr_scale' not in cfg


@pytest.mark.parametrize('content, message', [
    ('backbone = dict(', 'cannot be read: SyntaxError'),
    ('prompt = None', "backbone must be None .* got 'no such key'"),
    ('backbone = dict(prompt=None)', 'backbone must be None .* type, got'),
    ("backbone = None\ntrains = 'norms'", "trains='norms' needs a backbone of type"),
    ("backbone = dict(type='mmprotune.PromptedBackbone')\ntrains = 'heads'",
     'trains must be one of norms, biases, first_stage, last_stage'),
    ('backbone = None\nlr_scale = 0', 'lr_scale must be a positive number, got 0'),
    ("backbone = None\nlr_scale = 'a'", 'lr_scale must be a positive number'),
])
def test_a_file_that_is_no_method(content, message, tmp_path):
    file = tmp_path / 'own.py'
    file.write_text(content)
    with pytest.raises(LaunchError, match=f'own.py:? {message}'):
        read_method(str(file), FOLDER)
