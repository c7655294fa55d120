"""A long-tailed subset of any labelled classification dataset."""
from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
from mmengine.dataset import BaseDataset, force_full_init

from mmprotune.errors import OptionError, OptionTypeError
from mmprotune.registry import DATASETS

PROFILES = ('exp', 'step')


def class_sizes(classes: int, factor: float, largest: int, profile: str = 'exp') -> list[int]:
    r"""Images per class of a long-tailed set, the largest class first.

    'exp' is the profile of CIFAR-LT (Cui et al., https://arxiv.org/abs/1901.05555),
    :math:`n_i = \lfloor n_0 f^{-i / (C - 1)} \rfloor`; 'step' gives the first half of the classes
    :math:`n_0` images and the others :math:`\lfloor n_0 / f \rfloor` (Buda et al.,
    https://arxiv.org/abs/1710.05381).

    Args:
        classes (int): Number of classes C, at least 2.
        factor (float): Imbalance factor f, the largest class divided by the smallest; at least 1.
        largest (int): Images of the largest class, n_0.
        profile (str): 'exp' or 'step'. Defaults to 'exp'.

    Returns:
        list[int]: Images of each class; the i-th largest at index i.

    Raises:
        OptionError: An argument is out of range, or a class is left without images.
    """
    if profile not in PROFILES:
        raise OptionError(f'profile must be one of {PROFILES}, got {profile!r}')
    if not factor >= 1:
        raise OptionError(f'factor must be at least 1 (no imbalance), got {factor!r}')
    if classes < 2:
        raise OptionError(f'a long tail needs at least 2 classes, got {classes}')
    if profile == 'exp':
        exact = [largest * factor**(-i / (classes - 1)) for i in range(classes)]
    else:
        exact = [largest / (factor if i >= classes / 2 else 1) for i in range(classes)]
    # 500 / 50 must not become 9 by a rounding error.
    sizes = [math.floor(n + 1e-6) for n in exact]
    if sizes[-1] < 1:
        raise OptionError(
            f'factor={factor:g} leaves {sizes.count(0)} of {classes} classes empty: the largest '
            f'has {largest} images, so the factor can be {largest} at most')
    return sizes


@DATASETS.register_module()
class LongTailedDataset:
    """Wrapper that keeps a long-tailed part of a dataset.

    Which images of a class are kept depends on ``seed`` and the class alone, and those kept with a
    larger factor are among those kept with a smaller one. So runs are comparable across factors,
    profiles and machines.

    Args:
        dataset (BaseDataset | dict): A dataset with one label an image, or its config.
        factor (float): Images of the largest class divided by those of the smallest. 1 keeps the
            classes balanced. Defaults to 100.
        profile (str): 'exp' or 'step', see :func:`class_sizes`. Defaults to 'exp'.
        largest (int, optional): Images of the largest class. None means as many as the smallest
            class of ``dataset`` has, so that every class has enough. Defaults to None.
        shuffle_classes (bool): Whether a permutation, drawn with ``seed``, tells which classes are
            rare. Otherwise the last ones are. Defaults to False.
        seed (int): Seed of the choice of images. Defaults to 0.
        lazy_init (bool): Whether to leave reading the annotations to ``full_init``. Defaults to
            False.

    Attributes:
        class_counts (list[int]): Images of each class, by label.

    Raises:
        OptionTypeError: ``dataset`` is no dataset, or has images with no label or several.
        OptionError: A class has too few images, or none is left of one.
    """

    def __init__(self,
                 dataset: BaseDataset | dict,
                 factor: float = 100,
                 profile: str = 'exp',
                 largest: int | None = None,
                 shuffle_classes: bool = False,
                 seed: int = 0,
                 lazy_init: bool = False) -> None:
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        if not hasattr(dataset, 'get_cat_ids'):
            raise OptionTypeError('dataset must be a dataset with labels (get_cat_ids) or its '
                                  f'config, got {type(dataset).__name__}')
        self.dataset = dataset
        self.factor = factor
        self.profile = profile
        self.largest = largest
        self.shuffle_classes = shuffle_classes
        self.seed = seed
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict:
        """dict: Meta information of the wrapped dataset."""
        return copy.deepcopy(self.dataset.metainfo)

    def full_init(self) -> None:
        """Reads the annotations and chooses the images."""
        if self._fully_initialized:
            return
        self.dataset.full_init()
        members = members_by_class(self.dataset)
        smallest = min(len(m) for m in members)
        if not smallest:
            empty = [c for c, m in enumerate(members) if not len(m)]
            raise OptionError(f'{type(self.dataset).__name__} has no image of the classes {empty}')
        largest = smallest if self.largest is None else self.largest
        sizes = class_sizes(len(members), self.factor, largest, self.profile)
        ranks: Sequence[int] = range(len(members))
        if self.shuffle_classes:
            ranks = np.random.default_rng(self.seed).permutation(len(members)).tolist()
        self.class_counts = [sizes[rank] for rank in ranks]
        short = {c: len(m) for c, m in enumerate(members) if len(m) < self.class_counts[c]}
        if short:
            raise OptionError(f'largest={self.largest}: the classes {short} (label: images) have '
                              f'fewer than {[self.class_counts[c] for c in short]}')
        kept = [
            np.random.default_rng((self.seed, label)).permutation(members[label])[:count]
            for label, count in enumerate(self.class_counts)
        ]
        self._indices = np.sort(np.concatenate(kept))
        self._fully_initialized = True

    @force_full_init
    def get_data_info(self, idx: int) -> dict:
        """dict: Annotation of an image, as the wrapped dataset gives it."""
        return self.dataset.get_data_info(int(self._indices[idx]))

    @force_full_init
    def get_cat_ids(self, idx: int) -> list[int]:
        """list[int]: The label of an image, in a list."""
        return self.dataset.get_cat_ids(int(self._indices[idx]))

    @force_full_init
    def __len__(self) -> int:
        return len(self._indices)

    @force_full_init
    def __getitem__(self, idx: int):
        return self.dataset[int(self._indices[idx])]


def members_by_class(dataset) -> list[np.ndarray]:
    """Indices of a dataset's images by label.

    Args:
        dataset (BaseDataset): Fully initialised; its ``get_cat_ids`` gives one label an image.

    Returns:
        list[np.ndarray]: For each class, those that ``metainfo['classes']`` names included.

    Raises:
        OptionTypeError: An image has no label, or several.
    """
    labels = []
    for i in range(len(dataset)):
        ids = dataset.get_cat_ids(i)
        if len(ids) != 1:
            raise OptionTypeError(f'{type(dataset).__name__}: expected one label an image, '
                                  f'image {i} has {list(ids)}')
        labels.append(int(ids[0]))
    array = np.asarray(labels)
    classes = max(len((dataset.metainfo or {}).get('classes') or ()), array.max(initial=-1) + 1)
    return [np.flatnonzero(array == label) for label in range(classes)]
