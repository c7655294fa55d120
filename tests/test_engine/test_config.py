import copy

import pytest
from mmdet.models import FasterRCNN, ResNet
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import PretrainedInit

from mmprotune import FreezeGuardHook, PromptedBackbone, protune
from mmprotune.config_nodes import type_name
from mmprotune.engine.config import HOOKS
from tests.conftest import RESNET18, build


def test_a_stock_config_is_wrapped():
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    stock = cfg.model.backbone.to_dict()
    protune(cfg)
    assert cfg.model.backbone.type == 'mmprotune.PromptedBackbone'
    assert cfg.model.backbone.backbone.to_dict() == stock
    assert [h.type for h in cfg.custom_hooks] == list(HOOKS)
    before = cfg.copy()
    protune(cfg)  # again: nothing more to do
    assert cfg.to_dict() == before.to_dict()


def test_a_segmentors_pretrained_moves_to_the_backbone():
    cfg = protune(get_config('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'))
    assert 'pretrained' not in cfg.model
    assert cfg.model.backbone.backbone.init_cfg == dict(
        type='Pretrained', checkpoint='open-mmlab://resnet50_v1c')


def test_hooks_of_the_config_stay():
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet')), custom_hooks=[dict(type='A')]))
    assert [h.type for h in protune(cfg, freeze='all').custom_hooks] == ['A', *HOOKS]
    assert cfg.model.backbone['freeze'] == 'all'


def test_a_backbone_further_inside():
    cfg = get_config(
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py')
    stock = cfg.model.detector.backbone.to_dict()
    protune(cfg)
    assert cfg.model.detector.backbone.type == 'mmprotune.PromptedBackbone'
    assert cfg.model.detector.backbone.backbone.to_dict() == stock
    assert [h.type for h in cfg.custom_hooks] == ['MeanTeacherHook', *HOOKS]

    cfg = protune(Config(dict(model=dict(models=[dict(backbone=dict(type='ResNet'))]))))
    assert cfg.model.models[0].backbone.type == 'mmprotune.PromptedBackbone'


def test_one_of_several_backbones():
    name = 'mmdet::deepsort/deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17train_test-mot17test.py'
    with pytest.raises(ValueError, match=r'2 backbones: model\.detector\.backbone, '
                       r'model\.reid\.backbone\. Wrap the one .*mmprotune\.PromptedBackbone'):
        protune(get_config(name))
    cfg = get_config(name)
    cfg.model.reid.backbone = dict(
        type='mmprotune.PromptedBackbone', backbone=cfg.model.reid.backbone)
    protune(cfg)  # as the message says
    assert cfg.model.detector.backbone.type == 'ResNet'
    assert [h.type for h in cfg.custom_hooks][-3:] == list(HOOKS)


def test_the_file_of_a_whole_model():
    """Its backbone is what training would go on from."""
    cfg = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    assert 'frozen_from' not in protune(copy.deepcopy(cfg)).model.backbone
    cfg.load_from = 'detector.pth'
    assert protune(copy.deepcopy(cfg)).model.backbone.frozen_from == 'detector.pth'
    own = protune(copy.deepcopy(cfg), frozen_from='mine.pth')
    assert own.model.backbone.frozen_from == 'mine.pth'
    assert cfg.load_from == 'detector.pth'  # neck and head come from there too
    cfg.resume = True  # a checkpoint of this very run
    assert 'frozen_from' not in protune(cfg).model.backbone


@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit])
@pytest.mark.parametrize('path', ['model', 'model.detector'])
def test_the_file_of_what_holds_the_backbone(kind, path):
    backbone = dict(type='ResNet', init_cfg=dict(type='Pretrained', checkpoint='backbone.pth'))
    cfg = Config(dict(model=dict(detector=dict(backbone=backbone), neck=dict(
        init_cfg=dict(type='Pretrained', checkpoint='neck.pth')))))
    cfg.merge_from_dict({f'{path}.init_cfg': dict(type=kind, checkpoint='whole.pth')})
    wrapper = protune(cfg).model.detector.backbone
    assert wrapper.frozen_from == 'whole.pth'
    assert wrapper.backbone.to_dict() == backbone


def test_types_that_are_classes(resnet18_file):
    """As MMEngine's configs in pure Python have them."""
    init_cfg = dict(type=PretrainedInit, checkpoint=resnet18_file)
    cfg = Config(dict(
        model=dict(type=FasterRCNN, backbone=dict(RESNET18, type=ResNet, init_cfg=init_cfg)),
        custom_hooks=[dict(type=FreezeGuardHook)]))
    protune(cfg)
    assert [type_name(h) for h in cfg.custom_hooks] == [
        'FreezeGuardHook', 'PromptCheckpointHook', 'PromptStatsHook']
    assert build(cfg.model.backbone).frozen_names
    cfg.model.backbone['type'] = PromptedBackbone
    before = cfg.to_dict()
    assert protune(cfg).to_dict() == before


@pytest.mark.parametrize('content', [dict(), dict(model=dict(type='X')), dict(model=None)])
def test_no_backbone(content):
    with pytest.raises(ValueError, match='expected a config with model.backbone'):
        protune(Config(content))
