from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip('imagecorruptions')

from imagecorruptions import corruption_dict, get_corruption_names

from mmprotune.datasets.corrupt import COMMON, EXTRA, Corrupt
from mmprotune.errors import OptionError

# What draws nothing at random.
FIXED = {'defocus_blur', 'zoom_blur', 'brightness', 'contrast', 'pixelate', 'jpeg_compression',
         'gaussian_blur', 'saturate'}


def picture(size: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 216, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def corrupt(corruption: str, severity: int = 3, name: str = 'cat/1.png', **kwargs) -> np.ndarray:
    results = dict(img=picture().copy(), img_path=f'/anywhere/{name}')
    return Corrupt(corruption, severity, **kwargs)(results)['img']


def test_the_nineteen():
    assert list(COMMON + EXTRA) == get_corruption_names('all')
    assert list(COMMON) == get_corruption_names('common')


@pytest.mark.parametrize('corruption', COMMON + EXTRA)
def test_repeats_by_image(corruption):
    np.random.seed(1)
    first = corrupt(corruption)
    drawn = np.random.random()
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert not np.array_equal(first, picture())

    np.random.seed(2)
    assert np.array_equal(corrupt(corruption), first)
    other = corrupt(corruption, name='cat/2.png')
    assert np.array_equal(other, first) == (corruption in FIXED)
    assert np.array_equal(corrupt(corruption, seed=1), first) == (corruption in FIXED)

    # NumPy's global generator is where it was.
    np.random.seed(1)
    assert np.random.random() == drawn


@pytest.mark.parametrize('corruption', sorted(FIXED))
def test_is_what_the_package_does(corruption):
    rgb = picture()
    for severity in (1, 4):
        expected = np.uint8(corruption_dict[corruption](Image.fromarray(rgb), severity))
        results = Corrupt(corruption, severity, 'rgb')(dict(img=rgb, sample_idx=0))
        assert np.array_equal(results['img'], expected)
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        results = Corrupt(corruption, severity)(dict(img=bgr, sample_idx=0))
        assert np.array_equal(results['img'][..., ::-1], expected)


@pytest.mark.parametrize('corruption', ['gaussian_noise', 'contrast', 'defocus_blur', 'fog'])
def test_severity_counts(corruption):
    distances = [
        np.abs(corrupt(corruption, severity).astype(int) - picture()).mean()
        for severity in range(1, 6)
    ]
    assert distances == sorted(distances) and distances[4] > 1.3 * distances[0]


def test_images_are_known_by_name_or_row():
    """A moved data set, or a part of it, is corrupted as before."""
    transform = Corrupt('gaussian_noise', 3)
    noise = [transform(dict(img=picture(), **keys))['img'] for keys in (
        dict(img_path='/here/cat/1.png', sample_idx=7),
        dict(img_path='D:\\there\\cat\\1.png', sample_idx=9),
        dict(sample_idx=3), dict(sample_idx=0, row=3), dict(sample_idx=4))]
    assert np.array_equal(noise[0], noise[1])
    assert np.array_equal(noise[2], noise[3])
    assert not np.array_equal(noise[0], noise[2])
    assert not np.array_equal(noise[2], noise[4])


@pytest.mark.parametrize(('arguments', 'message'), [
    (('fogg', 3), "corruption must be one of gaussian_noise, .*; got 'fogg'"),
    (('fog', 0), 'severity must be 1 to 5, got 0'),
    (('fog', 6), 'severity must be 1 to 5, got 6'),
    (('fog', 3, 'gbr'), "channel_order .* got 'gbr'"),
])
def test_wrong_arguments(arguments, message):
    with pytest.raises(OptionError, match=message):
        Corrupt(*arguments)


@pytest.mark.parametrize(('results', 'message'), [
    (dict(img=np.zeros((64, 64, 3), np.float32), sample_idx=0), 'uint8 image .* float32'),
    (dict(img=np.zeros((64, 64), np.uint8), sample_idx=0), r'shape \(64, 64\)'),
    (dict(img=np.zeros((31, 64, 3), np.uint8), sample_idx=0), 'behind the resizing'),
    (dict(img=np.zeros((64, 64, 3), np.uint8)), r'img_path or sample_idx .* \[.img.\]'),
])
def test_wrong_images(results, message):
    with pytest.raises(OptionError, match=message):
        Corrupt('fog', 3)(results)


def test_package_is_missing_or_the_old_one(monkeypatch):
    monkeypatch.setitem(sys.modules, 'imagecorruptions', None)
    with pytest.raises(ImportError, match='pip install imagecorruptions-imaug'):
        Corrupt('fog', 3)
    old = types.ModuleType('imagecorruptions')
    old.corruption_dict = dict(glass_blur=lambda x, severity: x)
    monkeypatch.setitem(sys.modules, 'imagecorruptions', old)
    with pytest.raises(ImportError, match='cannot be seeded'):
        Corrupt('fog', 3)
