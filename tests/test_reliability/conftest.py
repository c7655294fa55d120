"""One short real run, whose checkpoint is then broken in every way."""
from __future__ import annotations

import pytest
from mmengine.registry import DefaultScope

from tests.detection import detector_cfg, draw_coco, run

from .models import prompted


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Folder with four drawn pictures and their annotations."""
    folder = tmp_path_factory.mktemp('reliability')
    draw_coco(folder)
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory, data, resnet18_file):
    """A prompted Faster R-CNN after one epoch through Runner: (config, its file, checkpoint)."""
    folder = tmp_path_factory.mktemp('run')
    cfg = detector_cfg(prompted(resnet18_file), data, folder, **{'train_cfg.max_epochs': 1})
    cfg.dump(str(folder / 'tiny.py'))
    with DefaultScope.overwrite_default_scope('mmdet'):
        run(cfg)
    return cfg, str(folder / 'tiny.py'), str(folder / 'epoch_1.pth')
