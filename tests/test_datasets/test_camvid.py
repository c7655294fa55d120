"""CamVid: what has no label is ignored, by the loss and by the metric."""
import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS

from mmprotune.engine import cli
from tests.test_configs import ROOT

SIZE = (360, 480)


@pytest.fixture(autouse=True)
def _mmseg_scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture
def data_root(tmp_path):
    """One image of each part, whose label image shows every class and what has none in stripes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12, dtype=np.uint8), SIZE[0] // 12)[:, None].repeat(SIZE[1], 1)
    for part in ('train', 'val'):
        for folder, picture in (('images', rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)),
                                ('annotations', labels)):
            (tmp_path / folder / part).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / folder / part / '0001TP_1.png'), picture)
    return str(tmp_path)


@pytest.fixture
def cfg() -> Config:
    return cli.load_config(str(ROOT / 'configs/upernet_r50_full_camvid.py'))


@pytest.mark.parametrize('part', ['train', 'val'])
def test_the_config_reads_it(data_root, cfg, part):
    dataset = DATASETS.build(dict(cfg[f'{part}_dataloader'].dataset, data_root=data_root))
    assert len(dataset) == 1
    assert len(dataset.metainfo['classes']) == len(dataset.metainfo['palette']) == 11
    item = dataset[0]
    found = set(item['data_samples'].gt_sem_seg.data.unique().tolist())
    if part == 'val':
        assert found == {*range(11), 255}
        assert item['inputs'].shape == (3, *SIZE)
    else:
        assert found <= {*range(11), 255} and len(found) > 1
        assert item['inputs'].shape == (3, *cfg.crop_size)


def test_some_classes_only(data_root, cfg):
    settings = dict(cfg.val_dataloader.dataset, data_root=data_root)
    dataset = DATASETS.build(dict(settings, metainfo=dict(classes=('car', 'road'))))
    assert dataset.metainfo['palette'] == [[64, 0, 128], [128, 64, 128]]
    labels = dataset[0]['data_samples'].gt_sem_seg.data[0, ::SIZE[0] // 12, 0].tolist()
    assert labels == [255, 255, 255, 1, 255, 255, 255, 255, 0, 255, 255, 255]
    with pytest.raises(ValueError, match='not a subset of classes'):
        DATASETS.build(dict(settings, metainfo=dict(classes=('tram', ))))


def test_a_folder_that_is_not_there(cfg, tmp_path):
    with pytest.raises(FileNotFoundError, match='images'):
        DATASETS.build(dict(cfg.val_dataloader.dataset, data_root=str(tmp_path)))
