"""Images and annotation files that are broken, and images that only look so."""
import json
import shutil

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope

from mmprotune.datasets.checked import check_image_file, dataset_error
from mmprotune.engine import cli
from mmprotune.errors import DataError
from tests.detection import detector_cfg, draw_coco
from tests.test_tools.conftest import load_tool

from .models import prompted

train = load_tool('train.py')
test = load_tool('test.py')


@pytest.fixture
def broken(data, tmp_path):
    """A copy of the data set to break."""
    shutil.copytree(data, tmp_path / 'data')
    return tmp_path / 'data'


def jpeg(quality=90):
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def png(array):
    return cv2.imencode('.png', array)[1].tobytes()


def start(tool, folder, weights, tmp_path, capsys, *argv, workers=0):
    cfg = detector_cfg(prompted(weights), folder, tmp_path / 'run')
    cfg.train_cfg.update(max_epochs=1, val_interval=10)
    cfg.train_dataloader.num_workers = workers
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    cfg.dump(str(tmp_path / 'tiny.py'))
    status = cli.run_tool(lambda: tool.main([str(tmp_path / 'tiny.py'), *argv]))
    return status, capsys.readouterr().err.strip().splitlines()


PICTURES = {
    'empty': (b'', 'the file is empty'),
    'text': (b'<html>404</html>', 'LoadImageFromFile failed'),
    'jpeg without its end': (jpeg()[:1500], 'is cut off or damaged'),
    'jpeg of its head': (jpeg()[:20], 'is cut off or damaged'),
    'png without its end': (png(np.zeros((64, 64, 3), np.uint8))[:-30], 'is cut off or damaged'),
    'one pixel': (png(np.full((1, 1, 3), 9, np.uint8)), None),
    'grey': (png(np.full((64, 64), 9, np.uint8)), None),
    'transparent': (png(np.full((64, 64, 4), 9, np.uint8)), None),
    'sixteen bits': (png(np.full((64, 64, 3), 999, np.uint16)), None),
    # Resized to 64 pixels, nothing is left of its height.
    '20000 by 8': (png(np.full((8, 20000, 3), 9, np.uint8)), 'Resize failed'),
}


def some_quick(kinds, *quick):
    return [pytest.param(k, marks=[] if k in quick else pytest.mark.slow) for k in kinds]


@pytest.mark.parametrize('kind', some_quick(
    PICTURES, 'empty', 'jpeg without its end', 'grey', '20000 by 8'))
def test_images(kind, broken, resnet18_file, tmp_path, capsys):
    content, message = PICTURES[kind]
    (broken / '2.png').write_bytes(content)  # OpenCV goes by the content
    status, err = start(train, broken, resnet18_file, tmp_path, capsys)
    if message is None:
        assert status == 0
        assert (tmp_path / 'run/epoch_1.pth').exists()
        return
    assert status == 1
    assert f'{broken}/2.png' in err[-1] and message in err[-1]
    assert 'error: ' in err[-1]


def test_long_images_train_at_their_size(broken, resnet18_file, tmp_path):
    (broken / '2.png').write_bytes(png(np.full((8, 20000, 3), 9, np.uint8)))
    cfg = detector_cfg(prompted(resnet18_file), broken, tmp_path / 'run')
    cfg.train_cfg.update(max_epochs=1, val_interval=10)
    cfg.train_dataloader.batch_size = 1
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None  # resizes too, after the last epoch
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline = [t for t in dataset.pipeline if t['type'] != 'Resize']
    cfg.dump(str(tmp_path / 'tiny.py'))
    assert cli.run_tool(lambda: train.main([str(tmp_path / 'tiny.py')])) == 0


def test_images_in_worker_processes(broken, resnet18_file, tmp_path, capsys):
    (broken / '2.png').write_bytes(b'')
    status, err = start(train, broken, resnet18_file, tmp_path, capsys, workers=1)
    assert status == 1
    assert err[-1].endswith(f'error: {broken}/2.png: the file is empty')


def test_images_in_testing(broken, trained, resnet18_file, tmp_path, capsys):
    (broken / '2.png').write_bytes(jpeg()[:1500])
    status, err = start(test, broken, resnet18_file, tmp_path, capsys, trained[2])
    assert status == 1
    assert f'{broken}/2.png (1500 bytes) is cut off or damaged' in err[-1]


def test_what_stands_behind_the_end_does_not_matter(tmp_path):
    for appended in (b'', b'\0' * 100, bytes(100_000)):
        (tmp_path / 'a.jpg').write_bytes(jpeg() + appended)
        check_image_file(str(tmp_path / 'a.jpg'))
    (tmp_path / 'a.jpg').write_bytes(jpeg()[:-700])
    with pytest.raises(DataError, match=r'a\.jpg'):
        check_image_file(str(tmp_path / 'a.jpg'))


def annotations(change):
    def changed(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)
    return changed


ANNOTATIONS = {
    'empty': lambda text: '',
    'half': lambda text: text[:len(text) // 2],
    'no json': lambda text: '<html>404</html>',
    'a list': lambda text: '[]',
    'a number': lambda text: '3',
    'no images': annotations(lambda c: c.pop('images')),
    'no categories': annotations(lambda c: c.pop('categories')),
    'no file name': annotations(lambda c: c['images'][1].pop('file_name')),
    'no box': annotations(lambda c: c['annotations'][1].pop('bbox')),
    'short box': annotations(lambda c: c['annotations'][1].update(bbox=[1, 2])),
    'text box': annotations(lambda c: c['annotations'][1].update(bbox=['a'] * 4)),
}


@pytest.mark.parametrize('kind', some_quick(ANNOTATIONS, 'empty', 'half', 'no file name'))
def test_annotation_files(kind, broken, resnet18_file, tmp_path, capsys):
    file = broken / 'ann.json'
    file.write_text(ANNOTATIONS[kind](file.read_text()))
    status, err = start(train, broken, resnet18_file, tmp_path, capsys)
    assert status == 1
    assert str(file) in err[-1] and 'cannot be read as annotations' in err[-1]


def test_classes_that_the_config_forgets(broken, resnet18_file, tmp_path, capsys):
    """The file is sound; a data set without `metainfo` looks for COCO's classes in it."""
    cfg = detector_cfg(prompted(resnet18_file), broken, tmp_path / 'run')
    del cfg.train_dataloader.dataset['metainfo']
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
    cfg.dump(str(tmp_path / 'tiny.py'))
    assert cli.run_tool(lambda: train.main([str(tmp_path / 'tiny.py')])) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert f'{broken / "ann.json"} has objects of the classes \'square\', \'other\'' in err
    assert 'metainfo=dict(classes=…)' in err and "'person', 'bicycle'" in err and '72 more' in err
    assert 'cannot be read' not in err


def test_a_filter_that_leaves_nothing(broken, resnet18_file, tmp_path, capsys):
    cfg = detector_cfg(prompted(resnet18_file), broken, tmp_path / 'run')
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=1000)
    cfg.dump(str(tmp_path / 'tiny.py'))
    assert cli.run_tool(lambda: train.main([str(tmp_path / 'tiny.py')])) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'was read, but leaves no image for CocoDataset' in err and "'min_size': 1000" in err


def test_a_missing_annotation_file(broken, resnet18_file, tmp_path, capsys):
    (broken / 'ann.json').unlink()
    status, err = start(train, broken, resnet18_file, tmp_path, capsys)
    assert status == 1 and f'{broken / "ann.json"} does not exist' in err[-1]
    assert 'data_root' in err[-1] and 'Traceback' not in ''.join(err)


def test_a_missing_folder_of_images(tmp_path):
    """As mmseg and mmpretrain look for it; mmdet reads its names from the annotations."""
    init_default_scope('mmseg')
    with pytest.raises(FileNotFoundError) as raised:
        DATASETS.build(dict(type='ADE20KDataset', data_root=str(tmp_path), pipeline=[],
                            data_prefix=dict(img_path='images', seg_map_path='maps')))
    assert f'{tmp_path / "images"} does not exist' in str(dataset_error(raised.value))
    assert dataset_error(FileNotFoundError(2, 'elsewhere', 'file')) is None


def test_images_of_another_suffix(tmp_path):
    for folder in ('images', 'masks'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'images/a.jpg').write_bytes(jpeg())
    cfg = dict(type='BaseSegDataset', data_root=str(tmp_path), img_suffix='.png',
               metainfo=dict(classes=('a', )), pipeline=[],
               data_prefix=dict(img_path='images', seg_map_path='masks'))
    init_default_scope('mmseg')
    with pytest.raises(ValueError, match='at least one array') as caught:
        DATASETS.build(cfg)
    told = dataset_error(caught.value)
    assert isinstance(told, DataError)
    assert 'BaseSegDataset found no image' in str(told) and "img_suffix='.png'" in str(told)
    assert str(tmp_path / 'images') in str(told)


def test_the_config_in_the_work_directory_is_the_users(data, resnet18_file, tmp_path, capsys):
    """An inferencer looks for the loading transform in it."""
    assert start(train, data, resnet18_file, tmp_path, capsys)[0] == 0
    assert 'CheckedPipeline' not in (tmp_path / 'run/tiny.py').read_text()


def test_drawn_data_is_sound(tmp_path):
    draw_coco(tmp_path)
    for path in tmp_path.glob('*.png'):
        check_image_file(str(path))
