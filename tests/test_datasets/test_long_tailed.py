from __future__ import annotations

import numpy as np
import pytest
from mmengine.dataset import BaseDataset

from mmprotune.datasets.long_tailed import LongTailedDataset, class_sizes
from mmprotune.errors import OptionError, OptionTypeError
from mmprotune.registry import DATASETS

from ..classification import CLASSES, classification_scope, draw_folder


@pytest.fixture(autouse=True)
def _scope():
    with classification_scope():
        yield


class Labels(BaseDataset):
    """A dataset that is nothing but labels."""

    def __init__(self, labels, classes):
        self.labels = labels
        super().__init__(metainfo=dict(classes=classes))

    def load_data_list(self):
        return [dict(gt_label=label, number=i) for i, label in enumerate(self.labels)]

    def get_cat_ids(self, idx):
        label = self.get_data_info(idx)['gt_label']
        return label if isinstance(label, list) else [label]


def labels(*counts: int) -> Labels:
    content = [label for label, count in enumerate(counts) for _ in range(count)]
    return Labels(content, tuple('abcdefghij'[:len(counts)]))


def numbers(dataset) -> set[int]:
    return {dataset.get_data_info(i)['number'] for i in range(len(dataset))}


def test_sizes_are_those_of_cifar10_lt():
    """The counts that papers print for CIFAR-10-LT with factor 100."""
    assert class_sizes(10, 100, 5000) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.mark.parametrize(('arguments', 'expected'), [
    ((5, 16, 160), [160, 80, 40, 20, 10]),
    ((5, 16, 160, 'step'), [160, 160, 160, 10, 10]),
    ((4, 50, 500, 'step'), [500, 500, 10, 10]),
    ((3, 1, 7), [7, 7, 7]),
    ((2, 3, 10), [10, 3]),
    # 6 * 49 ** -1 * … must not lose one to rounding.
    ((3, 49, 49), [49, 7, 1]),
])
def test_sizes(arguments, expected):
    assert class_sizes(*arguments) == expected


@pytest.mark.parametrize(('arguments', 'message'), [
    ((10, 100, 99), r'factor=100 leaves 1 of 10 classes empty.* 99 images'),
    ((4, 100, 20, 'step'), 'factor=100 leaves 2 of 4 classes empty'),
    ((10, 0.5, 100), 'factor must be at least 1'),
    ((10, float('nan'), 100), 'factor must be at least 1'),
    ((1, 10, 100), 'at least 2 classes'),
    ((10, 10, 100, 'linear'), "profile must be one of .*, got 'linear'"),
])
def test_wrong_sizes(arguments, message):
    with pytest.raises(OptionError, match=message):
        class_sizes(*arguments)


def test_classes_get_their_sizes():
    dataset = LongTailedDataset(labels(40, 50, 60), factor=4)
    assert dataset.class_counts == [40, 20, 10]
    found = [dataset.get_cat_ids(i)[0] for i in range(len(dataset))]
    assert np.bincount(found).tolist() == [40, 20, 10]
    assert dataset.metainfo['classes'] == ('a', 'b', 'c')
    assert LongTailedDataset(labels(40, 50, 60), factor=5, largest=35).class_counts[0] == 35


def test_choice_depends_on_seed_and_class_alone():
    first = numbers(LongTailedDataset(labels(40, 40, 40), factor=4))
    assert numbers(LongTailedDataset(labels(40, 40, 40), factor=4)) == first
    assert numbers(LongTailedDataset(labels(40, 40, 40), factor=4, seed=1)) != first
    # A larger factor keeps a part of what a smaller one keeps.
    assert numbers(LongTailedDataset(labels(40, 40, 40), factor=8)) < first
    # NumPy's global generator has no say.
    np.random.seed(3)
    assert numbers(LongTailedDataset(labels(40, 40, 40), factor=4)) == first
    # What else there is of other classes does not matter: 25 images of 'a' more.
    more = numbers(LongTailedDataset(labels(65, 40, 40), factor=4))
    assert {n - 25 for n in more if n >= 65} == {n for n in first if n >= 40}


def test_rare_classes_can_be_drawn():
    counts = LongTailedDataset(labels(*[32] * 8), factor=8, shuffle_classes=True, seed=5)
    assert sorted(counts.class_counts, reverse=True) == class_sizes(8, 8, 32)
    assert counts.class_counts != class_sizes(8, 8, 32)


def test_wraps_datasets_of_mmpretrain(tmp_path):
    draw_folder(tmp_path, (12, 12, 12, 12))
    cfg = dict(
        type='mmprotune.LongTailedDataset', factor=6,
        dataset=dict(
            type='CustomDataset', data_root=str(tmp_path),
            pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
    dataset = DATASETS.build(cfg)
    assert dataset.class_counts == [12, 6, 3, 2]
    assert tuple(dataset.metainfo['classes']) == CLASSES
    item = dataset[len(dataset) - 1]
    assert item['inputs'].shape == (3, 32, 32)
    assert int(item['data_samples'].gt_label) == 3
    # Around another wrapper, too.
    folds = dict(type='KFoldDataset', num_splits=4, seed=0, dataset=cfg['dataset'])
    assert sum(DATASETS.build(dict(cfg, dataset=folds, factor=2)).class_counts) < 36


@pytest.mark.parametrize(('dataset', 'kwargs', 'error', 'message'), [
    (labels(5, 0, 5), {}, OptionError, r'no image of the classes \[1\]'),
    (labels(9, 9), dict(factor=10), OptionError, 'leaves 1 of 2 classes empty'),
    (labels(9, 4), dict(factor=1, largest=8), OptionError, r'\{1: 4\}.*fewer than \[8\]'),
    (Labels([[0, 1], [1]], ('a', 'b')), {}, OptionTypeError, r'image 0 has \[0, 1\]'),
    (object(), {}, OptionTypeError, 'got object'),
])
def test_datasets_that_do_not_fit(dataset, kwargs, error, message):
    with pytest.raises(error, match=message):
        LongTailedDataset(dataset, **kwargs)
