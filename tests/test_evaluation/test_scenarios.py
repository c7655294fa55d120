"""Every cell of a scenario shows the model images in the channel order of its training."""
from __future__ import annotations

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from mmprotune.errors import OptionError, ScenarioError
from mmprotune.evaluation.scenarios import Options, build_dataset, innermost, make_cells
from mmprotune.registry import DATASETS, MODELS
from tests.classification import CLASSES, classification_scope, draw_folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The same images in folders, and decoded, as RGB."""
    folder = draw_folder(tmp_path_factory.mktemp('images'), (1, 1, 1, 1))
    images = [cv2.imread(str(folder / name / '0.png'))[..., ::-1] for name in CLASSES]
    np.save(folder / 'images.npy', np.stack(images))
    np.save(folder / 'labels.npy', np.arange(len(CLASSES)))
    return folder


def config(folder, decoded: bool, to_rgb: bool, where: str) -> Config:
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackInputs')
    files = dict(type='CustomDataset', data_root=str(folder))
    arrays = dict(type='mmprotune.NumpyImages', data_root=str(folder), images='images.npy',
                  labels='labels.npy', classes=CLASSES)
    own = dict(arrays, pipeline=[pack]) if decoded else dict(files, pipeline=[load, pack])
    preprocessor = dict(type='ClsDataPreprocessor', to_rgb=to_rgb)
    names = dict(zip(CLASSES, CLASSES))
    cfg = Config(dict(
        default_scope='mmpretrain', model=dict(type='ImageClassifier'),
        test_dataloader=dict(batch_size=4, dataset=own),
        shifts=dict(files=dict(dataset=files, class_map=names),
                    arrays=dict(dataset=arrays, class_map=names),
                    piped=dict(dataset=dict(arrays, pipeline=[pack]), class_map=names))))
    cfg.merge_from_dict({where: preprocessor})
    return cfg


@pytest.mark.parametrize('where', ['data_preprocessor', 'model.data_preprocessor'])
@pytest.mark.parametrize('to_rgb', [True, False])
@pytest.mark.parametrize('decoded', [True, False])
def test_the_model_sees_the_same_images(folder, decoded, to_rgb, where):
    cfg = config(folder, decoded, to_rgb, where)
    with classification_scope():
        cells = make_cells(cfg, 'ood', Options())
        seen = {}
        for cell in cells:
            items = [DATASETS.build(cell.dataloader['dataset'])[i] for i in range(len(CLASSES))]
            assert len(build_dataset(cell.dataloader['dataset'])) == len(CLASSES)
            preprocessor = MODELS.build(dict(type='ClsDataPreprocessor', to_rgb=cell.to_rgb))
            seen[cell.name] = preprocessor(pseudo_collate(items), False)['inputs'].numpy()
    assert list(seen) == ['clean', 'files', 'arrays', 'piped']
    assert cells[0].to_rgb == to_rgb  # the config's word counts for the model's own test set
    for name, images in seen.items():
        assert np.array_equal(images, seen['clean']), name
    # Channels do tell the images apart.
    assert not np.array_equal(seen['clean'], seen['clean'][:, ::-1])


@pytest.mark.parametrize('to_rgb', [True, False])
@pytest.mark.parametrize('decoded', [True, False])
def test_corruptions_know_the_order_of_the_pipeline(folder, decoded, to_rgb):
    """Which is not the model's: snow and frost have colours."""
    cfg = config(folder, decoded, to_rgb, 'data_preprocessor')
    with classification_scope():
        cells = make_cells(cfg, 'corruption', Options(corruptions=['snow'], severities=[1]))
    step = innermost(cells[1].dataloader['dataset'])['pipeline'][-2]
    assert step['type'] == 'mmprotune.Corrupt'
    assert step['channel_order'] == ('rgb' if decoded else 'bgr')
    assert cells[1].to_rgb == to_rgb


def test_a_shifted_set_may_say_so_itself(folder):
    cfg = config(folder, False, False, 'data_preprocessor')
    cfg.shifts.files.to_rgb = True
    with classification_scope():
        cells = {cell.name: cell.to_rgb for cell in make_cells(cfg, 'ood', Options())}
    assert cells == dict(clean=False, files=True, arrays=True, piped=True)


@pytest.mark.parametrize(('scenario', 'options', 'message'), [
    ('frost', {}, "scenario must be one of .*, got 'frost'"),
    ('adversarial', dict(limit=0), 'limit must be at least 1, got 0'),
    ('adversarial', dict(attacks=['fgsm-3']), "'fgsm-3': only PGD has steps"),
    ('adversarial', dict(attacks=['fgsm', 'fgsm']), 'cells are named twice'),
])
def test_wrong_options(folder, scenario, options, message):
    cfg = config(folder, False, True, 'data_preprocessor')
    with classification_scope(), pytest.raises(OptionError, match=message):
        make_cells(cfg, scenario, Options(**options))


def test_a_config_without_a_test_set(folder):
    cfg = config(folder, False, True, 'data_preprocessor')
    cfg.test_dataloader = None
    with pytest.raises(ScenarioError, match='test_dataloader: the config names no test set'):
        make_cells(cfg, 'corruption', Options())
