"""Looking through configs."""
from __future__ import annotations

import pytest
from mmengine.config import Config
from mmengine.model import PretrainedInit

from mmprotune.config_nodes import parse_config, without_pretrained
from mmprotune.models import PromptedBackbone


def test_without_pretrained():
    file = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    other = dict(type='Xavier', layer='Linear')
    stock = Config(dict(
        model=dict(
            pretrained='open-mmlab://resnet50_v1c',
            backbone=dict(
                type='mmprotune.PromptedBackbone', backbone=dict(type='ResNet', init_cfg=file)),
            heads=[dict(type='Head', init_cfg=[file, other]), dict(type='H', init_cfg=other)]),
        load_from='x.pth'))
    cfg = without_pretrained(stock)
    assert 'Pretrained' not in cfg.pretty_text
    assert 'resnet50_v1c' not in cfg.pretty_text
    assert cfg.model.backbone['freeze'] == 'all'
    assert cfg.model.heads == [dict(type='Head', init_cfg=[other]), dict(type='H', init_cfg=other)]
    assert cfg.load_from == 'x.pth'
    assert stock.model.backbone.backbone.init_cfg == file


def test_without_pretrained_of_classes_and_whole_models():
    file = dict(type=PretrainedInit, checkpoint='x.pth')
    cfg = without_pretrained(Config(dict(model=dict(
        init_cfg=dict(file),
        backbone=dict(type=PromptedBackbone, frozen_from='y.pth',
                      backbone=dict(type='ResNet', init_cfg=[file])),))))
    assert 'x.pth' not in str(cfg) and 'y.pth' not in str(cfg)
    assert cfg.model.backbone['freeze'] == 'all'


@pytest.mark.parametrize('host', ['mmseg', 'mmpretrain'])
@pytest.mark.parametrize('given', [dict(pretrained=True), {}])
def test_without_pretrained_of_timm(host, given):
    """mmseg's wrapper downloads where nothing is said."""
    cfg = without_pretrained(Config(dict(model=dict(backbone=dict(
        type=f'{host}.TIMMBackbone', model_name='resnet18', **given)))))
    assert cfg.model.backbone.pretrained is False


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


def test_parse_config():
    """What MMEngine writes comes back; nothing is run."""
    cfg = Config(dict(
        a=dict(type='A', scale=(1, -2.5), inner=[dict(b=None, c=True), {'d.e': 1, 2: 'x'}], f=()),
        words=["it's", 'two\nlines', '\\'], big=1e-05, all={'dict': {1}},
        default_scope='mmdet', end=float('inf')))
    found = parse_config(cfg.pretty_text)
    assert found.to_dict() == cfg.to_dict()
    assert type(found.a.scale) is tuple
    for text, message in (('import os', 'line 1: expected an assignment'),
                          ('a = 1\nb = open("c")', 'line 2: expected plain values, got .open'),
                          ('a = dict(**b)', 'expected plain'), ('a = dict([(1, 2)])', 'plain'),
                          ('a = b', "got 'b'"), ('a.b = 1', 'assignment'), ('a = [', 'no Python')):
        with pytest.raises(ValueError, match=message):
            parse_config(text)
