import pytest
from mmengine.config import Config
from mmengine.hub import get_config

from mmprotune import protune
from mmprotune.models.wrap import HOOKS


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


@pytest.mark.parametrize('content', [dict(), dict(model=dict(type='X')), dict(model=None)])
def test_no_backbone(content):
    with pytest.raises(ValueError, match='expected a config with model.backbone'):
        protune(Config(content))
