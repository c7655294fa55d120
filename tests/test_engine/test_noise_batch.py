import numpy as np
import pytest
from mmdet.models import FasterRCNN, SoftTeacher
from mmengine.config import Config

from mmprotune.engine.noise_batch import noise_item


@pytest.mark.parametrize('model', [
    dict(type=FasterRCNN, data_preprocessor=dict(pad_mask=True)),
    dict(type=SoftTeacher, data_preprocessor=dict(data_preprocessor=dict(pad_mask=True)))])
def test_configs_with_classes_for_types(model):
    """They need no scope; masks are asked for by whatever preprocessor is inside."""
    cfg = Config(dict(model=dict(model, head=dict(num_classes=3))))
    item = noise_item(cfg, 32, np.random.default_rng(0))
    instances = item['data_samples'].gt_instances
    assert item['inputs'].shape == (3, 32, 32)
    assert len(instances.masks) == len(instances.bboxes) == 2 and instances.labels.max() < 3


def test_another_librarys_config():
    with pytest.raises(KeyError, match='must be one of mmdet, mmseg, mmpretrain'):
        noise_item(Config(dict(default_scope='mmpose', model=dict())), 32, np.random.default_rng(0))
