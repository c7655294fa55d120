"""Files that are merged, extracted and verified."""
import os

import pytest
import torch
from mmengine.config import Config

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from mmprotune.errors import (
    CheckpointError,
    FingerprintMismatch,
)

from .models import CLASSES, prompted_config, same_weights, save_model, trained_model


@pytest.mark.parametrize('prompt', [dict(type='mmprotune.PromptBlock'), None])
def test_a_merged_file_works_with_the_config_in_it(file, tmp_path, prompt):
    """Without any other file; what the pre-trained one had not filled trains as before."""
    cfg = prompted_config(file, prompt=prompt)
    model = trained_model(cfg)
    with torch.no_grad():
        model.backbone.backbone.bn1.weight.add_(1)
    slim, full = save_model(model, tmp_path / 'slim.pth'), str(tmp_path / 'full.pth')
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
    assert same_weights(built, model)
    assert str(file) in torch.load(extracted, weights_only=True)['meta']['cfg']


def test_a_stock_model_has_no_weights_in_8_bits(file, tmp_path):
    cfg = prompted_config(file, prompt=None, backbone_dtype='int8', lean=True)
    model = trained_model(cfg)
    slim = save_model(model, tmp_path / 'slim.pth')
    checkpoint.merge(slim, cfg, tmp_path / 'full.pth')
    content = torch.load(tmp_path / 'full.pth', weights_only=True)['state_dict']
    tensors = model.backbone.frozen_tensors()
    assert not [key for key in content if key.endswith('_scale')]
    assert torch.equal(content['backbone.conv1.weight'],
                       tensors['conv1.weight'] * tensors['conv1.weight_scale'])


@pytest.mark.parametrize('by', ['class', 'dtype'])
def test_a_config_that_cannot_be_written_is_left_out(by, file, tmp_path):
    """MMEngine refuses a class, or writes it as a name that no reader knows; a dtype always so."""
    from mmpretrain.models import GlobalAveragePooling
    cfg = prompted_config(file)
    slim = save_model(trained_model(cfg), tmp_path / 'slim.pth', cfg='of another time')
    if by == 'class':
        cfg.model.neck.type = GlobalAveragePooling
    else:
        cfg.dtype = torch.float16
    assert checkpoint.merge(slim, cfg, tmp_path / 'full.pth')['kind'] == 'full'
    assert 'cfg' not in torch.load(tmp_path / 'full.pth', weights_only=True)['meta']


def test_a_merged_file_needs_no_frozen_from(file, resnet18_file, tmp_path):
    cfg = prompted_config(file, frozen_from=resnet18_file)
    slim = save_model(trained_model(cfg), tmp_path / 'slim.pth')
    checkpoint.merge(slim, cfg, tmp_path / 'full.pth')
    assert 'frozen_from' not in torch.load(
        tmp_path / 'full.pth', weights_only=True)['meta']['cfg']


def test_extract_says_how_another_backbone_could_be_used(file, resnet18_file, other_resnet18_file,
                                                         tmp_path):
    cfg = prompted_config(resnet18_file)
    full = str(tmp_path / 'full.pth')
    checkpoint.merge(save_model(trained_model(cfg), tmp_path / 'slim.pth'), cfg, full)
    other = prompted_config(other_resnet18_file)
    with pytest.raises(FingerprintMismatch, match=f'model.backbone.frozen_from={full} it can'):
        checkpoint.extract(full, other, tmp_path / 'out.pth')
    other.model.backbone['frozen_from'] = full
    assert checkpoint.extract(full, other, tmp_path / 'out.pth')['kind'] == 'slim'


def test_no_checkpoint_is_written_by_the_name_of_safetensors(file, tmp_path):
    cfg = prompted_config(file)
    slim = save_model(trained_model(cfg), tmp_path / 'slim.pth')
    with pytest.raises(CheckpointError, match='expected a name that ends with .pth'):
        checkpoint.merge(slim, cfg, tmp_path / 'full.safetensors')
    assert not (tmp_path / 'full.safetensors').exists()


def test_a_full_file_in_safetensors(file, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    cfg = prompted_config(file)
    model = trained_model(cfg)
    path = str(tmp_path / 'full.safetensors')
    safetensors.save_file(dict(checkpoint.full_state_dict(model)), path)
    assert checkpoint.verify(path, cfg)['kind'] == 'slim'  # without meta it cannot be told
    built = build_model(cfg)
    checkpoint.load(built, path)
    assert same_weights(built, model)
    assert checkpoint.extract(path, cfg, tmp_path / 'slim.pth')['kind'] == 'slim'


def test_verify_compares_the_classes(file, tmp_path):
    slim = save_model(trained_model(prompted_config(file)), tmp_path / 'slim.pth',
                      dataset_meta=dict(classes=CLASSES))
    checkpoint.verify(slim, prompted_config(file))
    for classes, match in (
            (('a', 'c', 'b', 'd'), r'same classes in another order. From number 1 on: expected '
                                   r'b, c, d, got c, b, d in test_dataloader.dataset.metainfo'),
            (('a', 'b', 'c', 'e'), 'with other classes. From number 3 on: expected d, got e in'),
            (('a', 'b', 'c', 'd', 'e'), 'with 4 classes, the config has 5. From number 4 on: '
                                        'expected none, got e')):
        with pytest.raises(CheckpointError, match=match):
            checkpoint.verify(slim, prompted_config(file, classes))
    # The sets inside wrappers are looked at, too.
    cfg = prompted_config(file)
    cfg.train_dataloader.dataset.dataset.datasets[0].metainfo.classes = ('a', 'b', 'd', 'c')
    with pytest.raises(CheckpointError, match=r'in train_dataloader\.dataset\.dataset\.datasets'):
        checkpoint.verify(slim, cfg)


@pytest.mark.parametrize('meta', [{}, dict(dataset_meta=None), dict(dataset_meta=3),
                                  dict(dataset_meta=dict(classes=None))])
def test_verify_without_classes_in_the_checkpoint(file, tmp_path, meta):
    slim = save_model(trained_model(prompted_config(file)), tmp_path / 'slim.pth', **meta)
    assert checkpoint.verify(slim, prompted_config(file))['kind'] == 'slim'
