"""Checkpoints and models that are not quite alike: precision, image size, classes, files."""
import os
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import load_checkpoint

from mmprotune import checkpoint, prompt_parameters
from mmprotune.checkpoints.convert import build_model
from mmprotune.engine.hooks import PromptCheckpointHook
from mmprotune.errors import (
    CheckpointError,
    FingerprintMismatch,
    IncompleteCheckpoint,
)
from tests.classification import classifier_cfg
from tests.conftest import RESNET18, build, wake

CLASSES = ('a', 'b', 'c', 'd')


def _cfg(file, classes=CLASSES, **options) -> Config:
    """A prompted classifier's whole config; its data are never read."""
    backbone = {'type': 'mmprotune.PromptedBackbone',
                'backbone': dict(RESNET18, init_cfg=dict(type='Pretrained', checkpoint=str(file))),
                'lean': False, **options}
    dataset = dict(type='CustomDataset', data_root='nowhere', metainfo=dict(classes=classes))
    return Config(dict(
        default_scope='mmpretrain', model=classifier_cfg(backbone),
        test_dataloader=dict(dataset=dataset),
        train_dataloader=dict(dataset=dict(
            type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[dataset]))))
    )


def _trained(cfg):
    model = build_model(cfg)
    wake(model, seed=3)
    return model


def _save(model, path, **meta):
    state_dict = model if isinstance(model, dict) else model.state_dict()
    torch.save(dict(meta=meta, state_dict=state_dict), path)
    return str(path)


@pytest.fixture
def file(resnet18_file, tmp_path):
    """A pre-trained file of the test's own, which does not fill everything."""
    weights = torch.load(resnet18_file)
    del weights['bn1.weight'], weights['bn1.bias']
    torch.save(weights, tmp_path / 'pretrained.pth')
    return tmp_path / 'pretrained.pth'


def _same(a, b):
    a, b = checkpoint.full_state_dict(a), checkpoint.full_state_dict(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) for k in a if not k.endswith('frozen_fingerprint'))


# --- what trains -----------------------------------------------------------------------------


def test_what_trains_inside_is_told_by_group(file):
    model = build_model(_cfg(file, trainable=[r'layer4\.1\.conv2\..*']))
    groups = prompt_parameters(model)
    assert {*groups['backbone']} == {
        'backbone.backbone.bn1.weight', 'backbone.backbone.bn1.bias',
        'backbone.backbone.layer4.1.conv2.weight'}
    assert {*groups['prompts']} == {
        name for name, _ in model.named_parameters() if name.startswith('backbone.prompts.')}
    named = dict(model.named_parameters())
    assert all(param is named[name] for group in groups.values() for name, param in group.items())
    # A backbone alone, and a model that has none.
    alone = prompt_parameters(model.backbone)
    assert 'backbone.bn1.weight' in alone['backbone'] and alone['prompts']
    assert prompt_parameters(model.head) == dict(prompts={}, backbone={})


# --- merged and extracted --------------------------------------------------------------------


@pytest.mark.parametrize('prompt', [dict(type='mmprotune.PromptBlock'), None])
def test_a_merged_file_works_with_the_config_in_it(file, tmp_path, prompt):
    """Without any other file; what the pre-trained one had not filled trains as before."""
    cfg = _cfg(file, prompt=prompt)
    model = _trained(cfg)
    with torch.no_grad():
        model.backbone.backbone.bn1.weight.add_(1)
    slim, full = _save(model, tmp_path / 'slim.pth'), str(tmp_path / 'full.pth')
    checkpoint.merge(slim, cfg, full)
    extracted = str(tmp_path / 'again.pth')
    checkpoint.extract(full, cfg, extracted)
    os.remove(file)
    again = Config.fromstring(
        torch.load(full, weights_only=True)['meta']['cfg'], file_format='.py')
    assert again.test_dataloader == cfg.test_dataloader
    built = build_model(again)
    checkpoint.load(built, full)
    assert built.backbone.frozen_names == model.backbone.frozen_names
    assert _same(built, model)
    assert str(file) in torch.load(extracted, weights_only=True)['meta']['cfg']


def test_a_config_that_cannot_be_written_is_left_out(file, tmp_path):
    from mmpretrain.models import GlobalAveragePooling
    cfg = _cfg(file)
    slim = _save(_trained(cfg), tmp_path / 'slim.pth', cfg='of another time')
    cfg.model.neck.type = GlobalAveragePooling
    assert checkpoint.merge(slim, cfg, tmp_path / 'full.pth')['kind'] == 'full'
    assert 'cfg' not in torch.load(tmp_path / 'full.pth', weights_only=True)['meta']


def test_a_merged_file_needs_no_frozen_from(file, resnet18_file, tmp_path):
    cfg = _cfg(file, frozen_from=resnet18_file)
    checkpoint.merge(_save(_trained(cfg), tmp_path / 'slim.pth'), cfg, tmp_path / 'full.pth')
    assert 'frozen_from' not in torch.load(
        tmp_path / 'full.pth', weights_only=True)['meta']['cfg']


def test_extract_says_how_another_backbone_could_be_used(file, resnet18_file, other_resnet18_file,
                                                         tmp_path):
    cfg = _cfg(resnet18_file)
    full = str(tmp_path / 'full.pth')
    checkpoint.merge(_save(_trained(cfg), tmp_path / 'slim.pth'), cfg, full)
    other = _cfg(other_resnet18_file)
    with pytest.raises(FingerprintMismatch, match=f'model.backbone.frozen_from={full} it can'):
        checkpoint.extract(full, other, tmp_path / 'out.pth')
    other.model.backbone['frozen_from'] = full
    assert checkpoint.extract(full, other, tmp_path / 'out.pth')['kind'] == 'slim'


def test_no_checkpoint_is_written_by_the_name_of_safetensors(file, tmp_path):
    cfg = _cfg(file)
    slim = _save(_trained(cfg), tmp_path / 'slim.pth')
    with pytest.raises(CheckpointError, match='expected a name that ends with .pth'):
        checkpoint.merge(slim, cfg, tmp_path / 'full.safetensors')
    assert not (tmp_path / 'full.safetensors').exists()


def test_a_full_file_in_safetensors(file, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    cfg = _cfg(file)
    model = _trained(cfg)
    path = str(tmp_path / 'full.safetensors')
    safetensors.save_file(dict(checkpoint.full_state_dict(model)), path)
    assert checkpoint.verify(path, cfg)['kind'] == 'slim'  # without meta it cannot be told
    built = build_model(cfg)
    checkpoint.load(built, path)
    assert _same(built, model)
    assert checkpoint.extract(path, cfg, tmp_path / 'slim.pth')['kind'] == 'slim'


# --- classes ---------------------------------------------------------------------------------


def test_verify_compares_the_classes(file, tmp_path):
    slim = _save(_trained(_cfg(file)), tmp_path / 'slim.pth', dataset_meta=dict(classes=CLASSES))
    checkpoint.verify(slim, _cfg(file))
    for classes, match in (
            (('a', 'c', 'b', 'd'), r'same classes in another order. From number 1 on: expected '
                                   r'b, c, d, got c, b, d in test_dataloader.dataset.metainfo'),
            (('a', 'b', 'c', 'e'), 'with other classes. From number 3 on: expected d, got e in'),
            (('a', 'b', 'c', 'd', 'e'), 'with 4 classes, the config has 5. From number 4 on: '
                                        'expected none, got e')):
        with pytest.raises(CheckpointError, match=match):
            checkpoint.verify(slim, _cfg(file, classes))
    # The sets inside wrappers are looked at, too.
    cfg = _cfg(file)
    cfg.train_dataloader.dataset.dataset.datasets[0].metainfo.classes = ('a', 'b', 'd', 'c')
    with pytest.raises(CheckpointError, match=r'in train_dataloader\.dataset\.dataset\.datasets'):
        checkpoint.verify(slim, cfg)


@pytest.mark.parametrize('meta', [{}, dict(dataset_meta=None), dict(dataset_meta=3),
                                  dict(dataset_meta=dict(classes=None))])
def test_verify_without_classes_in_the_checkpoint(file, tmp_path, meta):
    slim = _save(_trained(_cfg(file)), tmp_path / 'slim.pth', **meta)
    assert checkpoint.verify(slim, _cfg(file))['kind'] == 'slim'


def test_classes_come_from_wherever_a_data_set_has_them(tmp_path):
    from mmengine.registry import init_default_scope

    from mmprotune.config_nodes import class_names
    init_default_scope('mmdet')
    (tmp_path / 'classes.txt').write_text('a\nb\n')

    def names(**dataset):
        return list(class_names(Config(dict(test_dataloader=dict(dataset=dataset)))).values())

    assert len(names(type='CocoDataset', ann_file='none.json')[0]) == 80
    assert names(type='CocoDataset', ann_file='none.json', metainfo=dict(classes=('x', ))) == [
        ['x']]
    assert names(type='mmpretrain.CustomDataset', data_root='nowhere',
                 classes=str(tmp_path / 'classes.txt')) == [['a', 'b']]
    assert names(type='mmpretrain.CustomDataset', data_prefix='nowhere') == []
    assert names(type='mmprotune.NumpyImages', images='i', labels='l', classes=['a']) == [['a']]
    assert len(names(type='mmprotune.CamVidDataset')[0]) == 11
    assert names(type='NoSuchDataset', metainfo=dict(classes=['a', 'b'])) == [['a', 'b']]
    assert names(type='NoSuchDataset') == []
    assert class_names(Config(dict(test_dataloader=None))) == {}


# --- resuming --------------------------------------------------------------------------------


def test_resuming_needs_an_optimizer_without_strict_too(file, tmp_path):
    model = _trained(_cfg(file))
    content = torch.load(_save(model, tmp_path / 'epoch_1.pth', epoch=1, iter=2))
    runner = SimpleNamespace(_resume=True, _load_from='epoch_1.pth', model=model)
    with pytest.raises(IncompleteCheckpoint, match='no optimizer and no message_hub'):
        PromptCheckpointHook(strict=False).after_load_checkpoint(runner, content)


# --- image sizes -----------------------------------------------------------------------------

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

    path = _save({f'backbone.{k}': v for k, v in stock.state_dict().items()}, tmp_path / 'a.pth')
    model = torch.nn.ModuleDict(dict(backbone=prompted(large)))
    load_checkpoint(model, path)
    _check_filled(model.backbone.backbone, expected)
    filled = prompted(small)
    filled.load_state_dict(stock.state_dict())
    full = torch.nn.ModuleDict(dict(backbone=filled))
    path = _save(checkpoint.full_state_dict(full), tmp_path / 'full.pth')
    model = torch.nn.ModuleDict(dict(backbone=prompted(large)))
    checkpoint.load(model, path)
    _check_filled(model.backbone.backbone, expected)
    # What came is checked against the fingerprint before it is resized.
    content = torch.load(path)
    next(v for k, v in content['state_dict'].items() if v.dim() > 1).add_(1)
    with pytest.raises(FingerprintMismatch, match='damaged or was put together from two'):
        checkpoint.load(model, _save(content['state_dict'], tmp_path / 'damaged.pth'))


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


# --- precision -------------------------------------------------------------------------------


def _low(file):
    return _cfg(file, backbone_dtype='bfloat16', lean=True)


def test_full_files_of_another_precision(file, tmp_path):
    """float32 into bfloat16 and back. What has arrived is what came, cast."""
    full, low = _trained(_cfg(file)), _trained(_low(file))
    path = _save(checkpoint.full_state_dict(full), tmp_path / 'full.pth')
    identity = low.backbone.frozen_fingerprint.clone()
    checkpoint.load(low, path)
    conv = full.backbone.backbone.conv1.weight
    assert torch.equal(low.backbone.backbone.conv1.weight, conv.bfloat16())
    assert torch.equal(low.backbone.frozen_fingerprint, identity)
    path = _save(checkpoint.full_state_dict(low), tmp_path / 'low.pth')
    checkpoint.load(full, path)
    assert torch.equal(full.backbone.backbone.conv1.weight, conv.bfloat16().float())
    content = torch.load(path)['state_dict']
    content['backbone.backbone.conv1.weight'][0, 0, 0, 0] += 1
    for model in (full, low):
        with pytest.raises(FingerprintMismatch, match='damaged'):
            checkpoint.load(model, _save(content, tmp_path / 'damaged.pth'))


def test_models_that_were_cast(file, other_resnet18_file, tmp_path):
    """``model.half()`` keeps the identity of the weights it was built with, or was given since."""
    cfg = _cfg(file)
    model = _trained(cfg)
    slim = _save(model, tmp_path / 'slim.pth')
    full = _save(checkpoint.full_state_dict(model), tmp_path / 'full.pth')
    half = build_model(_cfg(other_resnet18_file, trainable=[r'bn1\..*'])).half()
    checkpoint.load(half, full)
    assert torch.equal(half.backbone.backbone.conv1.weight,
                       model.backbone.backbone.conv1.weight.half())
    checkpoint.load(half, slim)
    # A full file of it is whole, and loads anywhere.
    path = _save(checkpoint.full_state_dict(half), tmp_path / 'half.pth')
    for other in (build_model(cfg), half):
        checkpoint.load(other, path)
        weight = other.backbone.backbone.conv1.weight
        assert torch.equal(weight, model.backbone.backbone.conv1.weight.half().to(weight))


def test_a_file_of_a_model_that_froze_more_is_whole(resnet18_file, tmp_path):
    model = _trained(_cfg(resnet18_file))
    path = _save(checkpoint.full_state_dict(model), tmp_path / 'full.pth')
    other = build_model(_cfg(resnet18_file, trainable=['layer4.*']))
    checkpoint.load(other, path)
    assert torch.equal(other.head.fc.weight, model.head.fc.weight)
