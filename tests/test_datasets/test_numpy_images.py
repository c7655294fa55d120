from __future__ import annotations

import numpy as np
import pytest

from mmprotune.datasets import NumpyImages
from mmprotune.errors import DataError, OptionError
from mmprotune.registry import DATASETS

from ..classification import classification_scope


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / 'fog.npy', rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / 'labels.npy', np.array([0, 1, 2, 0, 1, 2]))
    return tmp_path


def cfg(folder, **kwargs) -> dict:
    return dict(dict(type='mmprotune.NumpyImages', images='fog.npy', labels='labels.npy',
                     classes=('a', 'b', 'c'), data_root=str(folder)), **kwargs)


def test_reads_a_part(folder):
    with classification_scope():
        dataset = DATASETS.build(cfg(folder, rows=(2, 5), pipeline=[dict(type='PackInputs')]))
    assert len(dataset) == 3
    assert [dataset.get_cat_ids(i) for i in range(3)] == [[2], [0], [1]]
    item = dataset[1]
    expected = np.load(folder / 'fog.npy')[3].transpose(2, 0, 1)
    assert np.array_equal(item['inputs'].numpy(), expected)
    assert int(item['data_samples'].gt_label) == 0
    assert dataset.get_subset([2]).get_data_info(0)['row'] == 4


@pytest.mark.parametrize(('change', 'error', 'message'), [
    (dict(rows=(0, 7)), OptionError, r'rows=\(0, 7\): the files have 6 rows'),
    (dict(rows=(3, 3)), OptionError, r'rows=\(3, 3\)'),
    (dict(classes=('a', 'b')), DataError, 'labels from 0 to 2, but there are 2 classes'),
    (dict(images='labels.npy'), DataError, r'expected uint8 of shape \(N, H, W, 3\)'),
    (dict(labels='fog.npy'), DataError, r'expected shape \(6,\)'),
])
def test_files_that_do_not_fit(folder, change, error, message):
    arguments = cfg(folder, **change)
    del arguments['type']
    with pytest.raises(error, match=message):
        NumpyImages(**arguments)
