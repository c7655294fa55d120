from __future__ import annotations

import json
import pathlib

import cv2
import numpy as np
import pytest

from mmprotune.errors import LaunchError

from ..classification import CLASSES, draw_folder
from .conftest import REPO, load_tool

pytest.importorskip('foolbox')
pytest.importorskip('imagecorruptions')
tool = load_tool('test_robustness.py')

CONFIG = """
_base_ = '{configs}/resnet50_protune_cifar10.py'
model = dict(
    backbone=dict(
        freeze='all', insert='stages', backbone=dict(depth=18, base_channels=8, init_cfg=None)),
    head=dict(in_channels=64, num_classes=4))
load = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
data = dict(type='CustomDataset', pipeline=load, _delete_=True)
loader = dict(batch_size=20, num_workers=0)
train_dataloader = dict(
    **loader, dataset=dict(
        type='mmprotune.LongTailedDataset', factor=4, _delete_=True,
        dataset=dict(type='CustomDataset', data_root='{data}/train', pipeline=load)))
val_dataloader = dict(**loader, dataset=dict(data, data_root='{data}/test'))
test_dataloader = val_dataloader
data_preprocessor = dict(num_classes=4, to_rgb=True)
randomness = dict(seed=0)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(lr=0.02))
train_cfg = dict(max_epochs=16, val_interval=16)
shifts = dict(_delete_=True, decoded=dict(
    dataset=dict(
        type='mmprotune.NumpyImages', data_root='{data}', images='images.npy', labels='labels.npy',
        classes=('fire', 'leaf')),
    class_map=dict(fire='red', leaf='green')))
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[str, str]:
    """A config and a slim checkpoint of a classifier of drawn colours."""
    folder = tmp_path_factory.mktemp('robustness')
    draw_folder(folder / 'train', (40, 40, 40, 40))
    draw_folder(folder / 'test', (5, 5, 5, 5), seed=1)
    draw_folder(folder / 'shifted', (3, 3, 3, 3), seed=2)
    # Red, then green, as RGB.
    rows = [sorted((folder / 'shifted' / name).glob('*.png')) for name in ('red', 'green')]
    images = [cv2.imread(str(path))[..., ::-1] for row in rows for path in row]
    np.save(folder / 'images.npy', np.stack(images))
    np.save(folder / 'labels.npy', np.repeat([0, 1], 3))
    config = folder / 'config.py'
    config.write_text(CONFIG.format(configs=REPO / 'configs', data=folder))
    load_tool('train.py').main([str(config), '--work-dir', str(folder / 'run')])
    return str(config), str(folder / 'run' / 'epoch_16.pth')


def run(trained, out: pathlib.Path, scenario: str, *args: str) -> dict:
    config, checkpoint = trained
    tool.main([config, checkpoint, '--work-dir', str(out / 'work'), '--out', str(out),
               '--scenario', scenario, *args])
    assert (out / f'{scenario}.png').read_bytes()[:4] == b'\x89PNG'
    return json.loads((out / f'{scenario}.json').read_text())


def test_corruption_and_going_on(trained, tmp_path, capsys, monkeypatch):
    args = ('--corruptions', 'contrast', 'gaussian_noise', '--severities', '1', '5')
    first = run(trained, tmp_path, 'corruption', *args)
    assert list(first['cells']) == [
        'clean', 'contrast/1', 'contrast/5', 'gaussian_noise/1', 'gaussian_noise/5']
    assert first['cells']['clean']['accuracy/top1'] > 90
    assert first['cells']['clean']['images'] == 20
    errors = [100 - first['cells'][name]['accuracy/top1'] for name in list(first['cells'])[1:]]
    assert first['summary']['mean_corruption_error'] == pytest.approx(np.mean(errors))
    assert 'mean_corruption_error' in capsys.readouterr().out

    # A run that was cut off repeats nothing, and one that repeats finds the same.
    report = json.loads((tmp_path / 'corruption.json').read_text())
    kept = report['cells'].pop('contrast/1')
    report['cells']['contrast/5']['seconds'] = 1234.
    (tmp_path / 'corruption.json').write_text(json.dumps(report))
    ran = []
    monkeypatch.setattr(tool, 'run_cell', lambda runner, cell: ran.append(cell.name) or original(
        runner, cell))
    second = run(trained, tmp_path, 'corruption', *args)
    assert ran == ['contrast/1']
    assert second['cells']['contrast/5']['seconds'] == 1234.
    assert list(second['cells']) == list(first['cells'])
    for key in ('accuracy/top1', 'calibration/ece'):
        assert second['cells']['contrast/1'][key] == kept[key]

    # Another seed is another run.
    ran.clear()
    run(trained, tmp_path, 'corruption', *args, '--seed', '1')
    assert len(ran) == 5

    # Against itself as the reference.
    reference = str(tmp_path / 'reference.json')
    pathlib.Path(reference).write_text((tmp_path / 'corruption.json').read_text())
    last = run(trained, tmp_path, 'corruption', *args, '--seed', '1', '--reference', reference)
    assert last['summary']['mCE'] == 100


original = tool.run_cell


def test_adversarial(trained, tmp_path, capsys):
    report = run(trained, tmp_path, 'adversarial', '--attacks', 'noise', 'fgsm', 'pgd-5', '--eps',
                 '0', '16', '--limit', '12', '--json')
    cells = {name: cell['accuracy/top1'] for name, cell in report['cells'].items()}
    assert cells['pgd-5/0'] == cells['noise/0'] == cells['clean']
    assert cells['pgd-5/16'] < 20 < 60 < cells['noise/16']
    assert cells['fgsm/16'] < cells['noise/16']
    assert report['cells']['clean']['images'] == 12
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report


def test_attack_by_config_alone(trained, tmp_path):
    """The wrapper in a config of the ordinary test tool finds what the scenario finds."""
    config = tmp_path / 'attacked.py'
    config.write_text(
        f'_base_ = {trained[0]!r}\n'
        "model = dict(_delete_=True, type='mmprotune.AttackedClassifier',\n"
        "             attack=dict(kind='fgsm', eps=4), module={{_base_.model}})\n")
    load_tool('test.py').main([str(config), trained[1], '--work-dir', str(tmp_path / 'test')])
    found = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())['accuracy/top1']
    report = run(trained, tmp_path, 'adversarial', '--attacks', 'fgsm', '--eps', '4')
    assert found == report['cells']['fgsm/4']['accuracy/top1']
    assert found < report['cells']['clean']['accuracy/top1']


def test_ood_from_the_config(trained, tmp_path):
    """Images that come decoded, as RGB, for a model that reads BGR files."""
    report = run(trained, tmp_path, 'ood')
    assert list(report['cells']) == ['clean', 'decoded', 'decoded/clean']
    found = report['summary']['decoded']
    assert found['accuracy'] == 100
    assert found['gap'] == found['same_classes_clean'] - 100
    # The evaluator left out the images of two of the four classes.
    assert report['cells']['decoded/clean']['images'] == 20
    assert found['same_classes_clean'] > 90


def test_ood_of_a_folder(trained, tmp_path):
    folder = pathlib.Path(trained[0]).parent / 'shifted'
    report = run(trained, tmp_path, 'ood', '--folder', str(folder))
    # The classes are the same: the clean cell is what the gap is measured against.
    assert list(report['cells']) == ['clean', 'shifted']
    assert report['summary']['shifted']['accuracy'] > 90
    # With a wrong map it is as wrong as can be.
    wrong = tmp_path / 'map.json'
    wrong.write_text(json.dumps(dict(zip(CLASSES, (*CLASSES[1:], CLASSES[0])))))
    report = run(trained, tmp_path, 'ood', '--folder', str(folder), '--class-map', str(wrong))
    assert report['summary']['shifted']['accuracy'] < 10


def test_longtail(trained, tmp_path):
    report = run(trained, tmp_path, 'longtail')
    # 40, 25, 15 and 10 training images.
    assert set(report['summary']) == {'clean', 'clean_ece', 'medium', 'few', 'mean'}
    assert report['summary']['mean'] == pytest.approx(report['summary']['clean'])


@pytest.mark.parametrize(('args', 'message'), [
    (('corruption', '--corruptions', 'fogg'), "one of gaussian_noise, .* got 'fogg'"),
    (('corruption', '--severities', '0'), r'severities must be 1 to 5, got \[0\]'),
    (('corruption', '--reference', 'none.json'), "--reference: 'none.json' is no corruption.json"),
    (('corruption', '--limit', '0'), 'limit must be at least 1'),
    (('adversarial', '--eps', '-1'), r'eps must be between 0 and 255 \(pixel values\), got -1'),
    (('adversarial', '--attacks', 'pdg-10'), "'pdg-10': only PGD has steps"),
    (('adversarial', '--attacks', 'pgd-0'), 'steps must be at least 1'),
    (('ood', '--shifts', 'imagenet_x'), 'no shifted set is called imagenet_x; there are decoded'),
    (('ood', '--folder', 'nowhere'), "--folder: no folder 'nowhere'"),
    (('ood', '--cfg-options', 'shifts.decoded.class_map.fire=pink'),
     r"class_map\['fire'\] is 'pink', which is no class of the model"),
    (('ood', '--cfg-options', 'shifts.decoded.extra=1'), 'shifts.decoded: expected dataset and'),
    (('ood', '--cfg-options', 'shifts.decoded.dataset.images=none.npy'), 'none.npy'),
    (('longtail', '--cfg-options', 'train_dataloader.dataset.factor=60'),
     'factor=60 leaves 1 of 4 classes empty'),
    (('longtail', '--cfg-options', 'default_scope=mmdet'), "default_scope='mmpretrain'"),
    (('longtail', '--launcher', 'pytorch'), '--launcher: the scenarios run in one process'),
])
def test_wrong_arguments(trained, tmp_path, args, message):
    config, checkpoint = trained
    with pytest.raises(LaunchError, match=message):
        tool.main([config, checkpoint, '--work-dir', str(tmp_path), '--scenario', *args])
    assert not list(tmp_path.glob('*.json'))


def test_config_without_shifts(trained, tmp_path):
    config = tmp_path / 'c.py'
    config.write_text(f'_base_ = {trained[0]!r}\nshifts = None\n')
    with pytest.raises(LaunchError, match='names no shifted sets'):
        tool.main([str(config), trained[1], '--work-dir', str(tmp_path), '--scenario', 'ood'])
