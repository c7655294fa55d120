"""The held-out part of a training set: which images, which pipeline, which annotations."""
from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmprotune.comparison.holdout import _covering, hold_out, make_split
from mmprotune.errors import LaunchError

from ..classification import draw_folder
from ..detection import detector_cfg, draw_coco
from ..test_tools.conftest import SIZE


def built(loader: dict):
    return DATASETS.build(loader.dataset)


def paths(dataset) -> list[str]:
    return [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]


def detection(folder, images=12) -> Config:
    draw_coco(folder, images)
    return detector_cfg(dict(type='mmdet.ResNet', depth=18, base_channels=8), folder, folder)


def test_a_detection_set_is_divided_with_its_annotations(tmp_path):
    cfg = detection(tmp_path)
    # The training set leaves the first image out, which shows nothing; a test set would not.
    content = json.loads((tmp_path / 'ann.json').read_text())
    del content['annotations'][0]
    (tmp_path / 'ann.json').write_text(json.dumps(content))
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True)
    init_default_scope('mmdet')
    everything = paths(built(cfg.train_dataloader))
    assert len(everything) == 11

    split = make_split(cfg, 0.3, tmp_path)
    hold_out(cfg, split)
    train, held = built(cfg.train_dataloader), built(cfg.val_dataloader)
    assert len(held) == 3 and sorted(paths(train) + paths(held)) == sorted(everything)
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_pipeline
    kept = json.loads(Path(cfg.val_evaluator.ann_file).read_text())
    ids = {held.get_data_info(i)['img_id'] for i in range(3)}
    assert {image['id'] for image in kept['images']} == ids
    assert {one['image_id'] for one in kept['annotations']} == ids
    assert kept['categories'] == content['categories']
    # The folder may be moved, and the division stays.
    moved = tmp_path / 'moved'
    moved.mkdir()
    for name in ('holdout.json', 'holdout_annotations.json'):
        (tmp_path / name).rename(moved / name)
    again = make_split(cfg, 0.3, moved)
    assert (again.train, again.held) == (split.train, split.held)
    assert again.ann_file == str(moved / 'holdout_annotations.json')


@pytest.mark.parametrize('indices, left', [
    (8, range(8)), (-8, range(4, 12)), ([1, 3, 5, 7, 9], [1, 3, 5, 7, 9])])
def test_a_part_of_a_part(indices, left, tmp_path):
    cfg = detection(tmp_path)
    cfg.train_dataloader.dataset.indices = indices
    split = make_split(cfg, 0.4, tmp_path)
    assert sorted(split.train + split.held) == list(left)
    hold_out(cfg, split)
    init_default_scope('mmdet')
    names = paths(built(cfg.train_dataloader)) + paths(built(cfg.val_dataloader))
    assert sorted(names) == sorted(str(tmp_path / f'{i}.png') for i in left)


def test_a_set_inside_a_wrapper(tmp_path):
    cfg = detection(tmp_path)
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset)
    split = make_split(cfg, 0.25, tmp_path)
    hold_out(cfg, split)
    init_default_scope('mmdet')
    assert len(built(cfg.train_dataloader)) == 18
    assert len(built(cfg.val_dataloader)) == 3


def test_several_sets_are_refused(tmp_path):
    cfg = detection(tmp_path)
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[cfg.train_dataloader.dataset] * 2)
    with pytest.raises(LaunchError, match='train_dataloader.dataset .* got ConcatDataset'):
        make_split(cfg, 0.25, tmp_path)
    cfg = detection(tmp_path)
    cfg.val_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[cfg.val_dataloader.dataset] * 2)
    with pytest.raises(LaunchError, match='val_dataloader.dataset .* got ConcatDataset'):
        make_split(cfg, 0.25, tmp_path)
    assert not (tmp_path / 'holdout.json').exists()


def test_folds_are_refused(tmp_path):
    """What is in the wrapper has the images of the validation, too."""
    draw_folder(tmp_path / 'train', (6, 6, 6, 6))
    dataset = dict(type='CustomDataset', data_root=str(tmp_path), data_prefix='train', pipeline=[])
    folds = dict(type='KFoldDataset', num_splits=3, fold=0, dataset=dataset)
    cfg = Config(dict(
        default_scope='mmpretrain', train_dataloader=dict(dataset=folds),
        val_dataloader=dict(dataset=dict(folds, test_mode=True)),
        val_evaluator=dict(type='Accuracy')))
    with pytest.raises(LaunchError, match='train_dataloader.dataset .* got KFoldDataset'):
        make_split(cfg, 0.25, tmp_path)


def segmentation(folder, labels: list[list[int]]) -> Config:
    """Label maps with the given classes of three; 255 counts as none."""
    for part in ('images', 'maps'):
        (folder / part).mkdir()
    for i, shown in enumerate(labels):
        cv2.imwrite(str(folder / f'images/{i:02}.png'), np.zeros((SIZE, SIZE, 3), np.uint8))
        cv2.imwrite(str(folder / f'maps/{i:02}.png'),
                    np.resize(np.array([*shown, 255], np.uint8), (SIZE, SIZE)))
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackSegInputs')
    dataset = dict(
        type='BaseSegDataset', data_root=str(folder), img_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='maps'),
        metainfo=dict(classes=('a', 'b', 'c')),
        pipeline=[load, dict(type='LoadAnnotations'), pack])
    return Config(dict(
        default_scope='mmseg', train_dataloader=dict(dataset=dataset),
        val_dataloader=dict(dataset=dict(dataset, pipeline=[load, pack])),
        val_evaluator=dict(type='IoUMetric')))


def test_both_parts_of_a_segmentation_set_show_every_class(tmp_path):
    # Class 2 is on two of twenty images: one division in ten has one in each part of 2 and 18.
    labels = [[0, 1]] * 18 + [[0, 1, 2]] * 2
    cfg = segmentation(tmp_path, labels)
    split = make_split(cfg, 0.1, tmp_path)
    for part in (split.train, split.held):
        assert {label for i in part for label in labels[i]} == {0, 1, 2}
    assert split.alone == [] and split.ann_file is None


def test_many_rare_classes_are_in_both_parts():
    """Each on two of a hundred images: no random fifth has one image of each."""
    shown = np.zeros((100, 20), bool)
    for label in range(19):
        shown[[label, 50 + label], label] = True
    shown[:, 19] = True
    held = _covering(shown, np.ones(20, bool), 20)
    assert len(held) == len(set(held)) == 20
    kept = sorted(set(range(100)) - set(held))
    assert shown[held].any(0).all() and shown[kept].any(0).all()


def test_a_class_that_one_image_alone_shows_is_told(tmp_path):
    cfg = segmentation(tmp_path, [[0], [0], [0, 2], [0]])
    assert make_split(cfg, 0.5, tmp_path).alone == ['c']


def test_a_part_too_small_for_the_classes_is_refused(tmp_path):
    cfg = segmentation(tmp_path, [[0], [1], [2]] * 4)
    with pytest.raises(LaunchError, match='--holdout 0.17: 2 of 12 images do not show every class'
                       '; 3 can, --holdout 0.25'):
        make_split(cfg, 0.17, tmp_path)
    assert not (tmp_path / 'holdout.json').exists()


def test_a_classification_set(tmp_path):
    draw_folder(tmp_path / 'train', (6, 6, 6, 6))
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackInputs')
    dataset = dict(type='CustomDataset', data_root=str(tmp_path), data_prefix='train',
                   pipeline=[load, pack])
    cfg = Config(dict(
        default_scope='mmpretrain', train_dataloader=dict(dataset=dataset),
        val_dataloader=dict(dataset=dict(dataset, data_prefix='test')),
        val_evaluator=dict(type='Accuracy')))
    split = make_split(cfg, 0.2, tmp_path)
    hold_out(cfg, split)
    held = built(cfg.val_dataloader)
    assert sorted(held.get_cat_ids(i)[0] for i in range(5))[::4] == [0, 3]
    assert set(held.get_gt_labels()) == {0, 1, 2, 3}
