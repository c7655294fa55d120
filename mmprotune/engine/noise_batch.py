"""Noise images with annotations for any model of the three libraries: a config without its data."""
from __future__ import annotations

import json
import re

import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData

from mmprotune.config_nodes import dicts_in

# Corners of two boxes that overlap, as shares of the image's side.
BOXES = ((1 / 16, 1 / 16, 5 / 8, 1 / 2), (3 / 8, 15 / 32, 15 / 16, 31 / 32))


def noise_item(cfg: Config, size: int, rng: np.random.Generator) -> dict:
    """One item as the data set of a config would hand it to the collate function.

    Args:
        cfg (Config): The config; its ``default_scope``, or the class of its model, says which
            library's item it is.
        size (int): Side of the image, in pixels.
        rng (numpy.random.Generator): Draws the image and the labels.

    Returns:
        dict: ``inputs``: uint8 Tensor of shape (3, size, size); ``data_samples``: annotations of
        what the model learns (two boxes, with masks where the model wants them; a label map; a
        label).

    Raises:
        KeyError: That is none of the three libraries.
    """
    items = dict(mmdet=_detection, mmseg=_segmentation, mmpretrain=_classification)
    # A config that names classes themselves needs no scope.
    scope = cfg.get('default_scope') or getattr(
        cfg.model.get('type'), '__module__', '').partition('.')[0]
    if scope not in items:
        raise KeyError(f'default_scope must be one of {", ".join(items)}, got {scope!r}')
    found = re.findall(r'"num_classes": (\d+)', json.dumps(cfg.model.to_dict(), default=str))
    meta = dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1., 1.), img_id=0)
    image = torch.from_numpy(rng.integers(0, 256, (3, size, size), dtype=np.uint8))
    sample = items[scope](cfg, size, rng, min(map(int, found)), meta)
    return dict(inputs=image, data_samples=sample)


def _detection(cfg: Config, size: int, rng: np.random.Generator, classes: int, meta: dict):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    boxes = np.array(BOXES, dtype=np.float32) * size
    instances = InstanceData(
        bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(rng.integers(0, classes, 2)))
    if any(node.get('pad_mask') for node in dicts_in(cfg.model.get('data_preprocessor'))):
        masks = np.zeros((2, size, size), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
            mask[y1:y2, x1:x2] = 1
        instances.masks = BitmapMasks(masks, size, size)
    ignored = InstanceData(bboxes=torch.zeros(0, 4))
    return DetDataSample(metainfo=meta, gt_instances=instances, ignored_instances=ignored)


def _segmentation(cfg: Config, size: int, rng: np.random.Generator, classes: int, meta: dict):
    from mmseg.structures import SegDataSample
    labels = torch.from_numpy(rng.integers(0, classes, (1, size, size)))
    return SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels))


def _classification(cfg: Config, size: int, rng: np.random.Generator, classes: int, meta: dict):
    from mmpretrain.structures import DataSample
    return DataSample(metainfo=meta).set_gt_label(int(rng.integers(0, classes)))
