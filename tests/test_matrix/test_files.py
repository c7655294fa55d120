"""The file that a stock config names, and where a run looks for the one in its place."""
import pytest
from mmengine.config import Config

from mmprotune.matrix.configs import runnable
from mmprotune.matrix.files import NO_FILE, file_key, point

FILE = dict(type='Pretrained', checkpoint='https://example.org/x.pth', prefix='backbone')


@pytest.mark.parametrize('model, load_from, key', [
    (dict(backbone=dict(type='ResNet', init_cfg=FILE)), None, 'init_cfg'),
    (dict(backbone=dict(type='ResNet', init_cfg=[dict(type='Kaiming'), FILE])), None, 'init_cfg'),
    (dict(backbone=dict(type='PVT', init_cfg=dict(checkpoint='x.pth'))), 'y.pth', 'init_cfg'),
    (dict(backbone=dict(type='TIMMBackbone', pretrained=True)), None, 'pretrained'),
    (dict(backbone=dict(type='ResNet'), pretrained='x.pth'), None, 'model.pretrained'),
    (dict(backbone=dict(type='BiSeNetV1', backbone_cfg=dict(init_cfg=FILE))), None,
     'backbone_cfg.init_cfg'),
    (dict(detector=dict(backbone=dict(type='ResNet', init_cfg=FILE))), None, 'init_cfg'),
    (dict(backbone=dict(type='ResNet')), 'y.pth', 'load_from'),
    (dict(backbone=dict(type='ResNet'), head=dict(init_cfg=FILE)), None, NO_FILE),
])
def test_the_file_is_named_where_the_config_names_one(model, load_from, key, tmp_path):
    original = Config(dict(model=model, load_from=load_from, default_scope='mmdet'))
    before = original.to_dict()
    assert file_key(original) == key
    cfg = runnable(original)
    assert 'example.org' not in str(cfg.to_dict()) and 'x.pth' not in str(cfg.to_dict())
    options = point(cfg, original, tmp_path)
    assert original.to_dict() == before
    text = str(cfg.model.to_dict())
    assert ('backbone.pth' in text) == (key not in ('load_from', NO_FILE))
    # A backbone may forbid an init_cfg.
    file = dict(frozen_from=str(tmp_path / 'backbone.pth'))
    assert options == (file if key == NO_FILE else {})
    assert cfg.load_from == (str(tmp_path / 'model.pth') if load_from else None)
    if model.get('detector'):
        assert cfg.model.detector.backbone.init_cfg.prefix == 'backbone'
