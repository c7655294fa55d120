"""Flags of training, and files that are looked for before it."""
from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmprotune.engine import training
from mmprotune.errors import LaunchError


def test_resume_from_a_file(tmp_path):
    file = tmp_path / 'a.pth'
    file.touch()
    cfg = Config(dict(work_dir=str(tmp_path), load_from='weights.pth', resume=False))
    training.set_resume(cfg, str(file))
    assert (cfg.resume, cfg.load_from) == (True, str(file))


def test_resume_auto(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), load_from='weights.pth', resume=False))
    training.set_resume(cfg, 'auto')
    # Nothing to resume: what the config said stays.
    assert (cfg.resume, cfg.load_from) == (False, 'weights.pth')

    newest = tmp_path / 'epoch_2.pth'
    torch.save(dict(optimizer={}), newest)
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    training.set_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (True, str(newest))


def test_resume_from_nothing(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path)))
    with pytest.raises(LaunchError, match='--resume: no file'):
        training.set_resume(cfg, str(tmp_path / 'none.pth'))
    training.set_resume(cfg, None)
    assert 'resume' not in cfg


@pytest.mark.parametrize(('options', 'key'), [
    ({'model.backbone.init_cfg': dict(type='Pretrained', checkpoint='no/a.pth')},
     'model.backbone.init_cfg.checkpoint'),
    ({'model.pretrained': 'no/a.pth'}, 'model.pretrained'),
    ({'model.neck.init_cfg': dict(type='Pretrained', checkpoint='no/a.pth')},
     'model.neck.init_cfg.checkpoint'),
    ({'model.backbone.frozen_from': 'no/a.pth'}, 'model.backbone.frozen_from')])
def test_a_missing_pretrained_file_is_named_with_its_key(options, key):
    cfg = Config(dict(model=dict(backbone=dict(type='X'), neck=dict(type='Y'))))
    training.check_pretrained_files(cfg)
    cfg.merge_from_dict(options)
    with pytest.raises(LaunchError, match=rf"^{key}: no file 'no/a.pth'; .* {key}=PATH"):
        training.check_pretrained_files(cfg)


def test_what_is_no_local_file(tmp_path):
    (tmp_path / 'a.pth').touch()
    for file in (str(tmp_path / 'a.pth'), 'torchvision://resnet50', 'https://example.org/a.pth',
                 'ViT-B/16', True):
        training.check_pretrained_files(Config(dict(model=dict(backbone=dict(pretrained=file)))))


def test_a_checkpoint_stands_in_for_the_file_of_a_frozen_backbone():
    file = dict(init_cfg=dict(type='Pretrained', checkpoint='no/a.pth'))
    cfg = Config(dict(load_from='run.pth', model=dict(backbone=dict(
        type='mmprotune.PromptedBackbone', backbone=dict(type='X', **file)))))
    training.check_pretrained_files(cfg)
    cfg.model.neck = file
    with pytest.raises(LaunchError, match='^model.neck.init_cfg'):
        training.check_pretrained_files(cfg)


def test_amp(on_gpu):
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    training.use_amp(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale=512.)))
    training.use_amp(cfg)
    assert cfg.optim_wrapper.loss_scale == 512.
    with pytest.raises(LaunchError, match="optim_wrapper.type must be .* got 'Own'"):
        training.use_amp(Config(dict(optim_wrapper=dict(type='Own'))))


def test_amp_of_a_class(on_gpu):
    cfg = Config(dict(optim_wrapper=dict(type=OptimWrapper)))
    training.use_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'


def test_amp_without_gpu(on_cpu):
    with pytest.raises(LaunchError, match='--amp needs a GPU'):
        training.use_amp(Config(dict(optim_wrapper=dict(type='OptimWrapper'))))


def test_auto_scale_lr():
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    training.use_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True
    for without in (dict(), dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(LaunchError, match='auto_scale_lr.base_batch_size'):
            training.use_auto_scale_lr(Config(without))
