"""Images and labels in two .npy files, as CIFAR-10.1 and CIFAR-10-C come."""
from __future__ import annotations

import os.path as osp
from collections.abc import Sequence

import numpy as np
from mmengine.dataset import BaseDataset

from mmprotune.errors import DataError, OptionError
from mmprotune.registry import DATASETS


@DATASETS.register_module()
class NumpyImages(BaseDataset):
    """Classification set in two .npy files. The images stay on disk until they are asked for.

    Pipelines get ``img`` (RGB) and ``gt_label``, and need no ``LoadImageFromFile``.

    Args:
        images (str): File of an array of shape (N, H, W, 3), uint8, RGB.
        labels (str): File of an array of shape (N, ), integers.
        classes (Sequence[str]): Names of the classes.
        rows (tuple[int, int], optional): First row, and the one after the last, of the part to
            use. The files of CIFAR-10-C hold severity s in the rows 10000(s-1) to 10000s. Defaults
            to None: all.
        data_root (str): Folder of both files. Defaults to ''.
        **kwargs: Other arguments of :class:`mmengine.dataset.BaseDataset`: ``pipeline``, ….

    Raises:
        DataError: The files do not fit each other, or ``classes``.
        OptionError: ``rows`` are no part of them.
    """

    def __init__(self,
                 images: str,
                 labels: str,
                 classes: Sequence[str],
                 rows: tuple[int, int] | None = None,
                 data_root: str = '',
                 **kwargs) -> None:
        self.images_file = osp.join(data_root, images)
        self.labels_file = osp.join(data_root, labels)
        self.rows = rows
        super().__init__(metainfo=dict(classes=tuple(classes)), data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """list[dict]: Row and label of each image."""
        self._images = np.load(self.images_file, mmap_mode='r')
        labels = np.load(self.labels_file)
        shape = self._images.shape
        if self._images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise DataError(f'{self.images_file}: expected uint8 of shape (N, H, W, 3), got '
                            f'{self._images.dtype} of shape {shape}')
        if labels.shape != shape[:1]:
            raise DataError(f'{self.labels_file}: expected shape {shape[:1]}, one label for each '
                            f'image of {self.images_file}; got {labels.shape}')
        start, stop = self.rows or (0, len(labels))
        if not 0 <= start < stop <= len(labels):
            raise OptionError(f'rows={self.rows}: the files have {len(labels)} rows')
        classes = len(self.metainfo['classes'])
        part = labels[start:stop]
        if part.min() < 0 or part.max() >= classes:
            raise DataError(f'{self.labels_file}: labels from {part.min()} to {part.max()}, but '
                            f'there are {classes} classes')
        return [dict(row=row, gt_label=int(labels[row])) for row in range(start, stop)]

    def get_data_info(self, idx: int) -> dict:
        """dict: ``img`` (H, W, 3), ``gt_label`` and the indices of an image."""
        info = super().get_data_info(idx)
        info['img'] = np.array(self._images[info['row']])
        info['img_shape'] = info['ori_shape'] = info['img'].shape[:2]
        return info

    def get_cat_ids(self, idx: int) -> list[int]:
        """list[int]: The label of an image, in a list."""
        return [super().get_data_info(idx)['gt_label']]
