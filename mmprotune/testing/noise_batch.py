"""Noise images with annotations for any model of the three libraries: a config without its data."""
from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from mmprotune.config_nodes import dicts_in, type_name

# Corners of two boxes that overlap, as shares of the image's side.
BOXES = ((1 / 16, 1 / 16, 5 / 8, 1 / 2), (3 / 8, 15 / 32, 15 / 16, 31 / 32))
# What SoftTeacher and its like call the branches of their pipelines.
BRANCHES = ('sup', 'unsup_teacher', 'unsup_student')


def noise_item(cfg: Config, size: int, rng: np.random.Generator) -> dict:
    """One item as the data set of a config would hand it to the collate function.

    Args:
        cfg (Config): The config; its ``default_scope``, or the class of its model, says which
            library's item it is, its ``data_preprocessor`` whether that is an image, two frames or
            one for each branch.
        size (int): Side of the image, in pixels.
        rng (numpy.random.Generator): Draws the image and the labels.

    Returns:
        dict: ``inputs``: uint8 Tensor of shape (3, size, size), a list of them where the training
        pipeline makes several views, (2, 3, size, size) for a video, (3, 2 * size, size) where
        persons are told apart; ``data_samples``: annotations of what the model learns (two boxes,
        with masks where the model wants them; a label map; a label). Semi-supervised models have a
        dict of both by branch.

    Raises:
        KeyError: That is none of the three libraries.
    """
    items = dict(mmdet=_detection, mmseg=_segmentation, mmpretrain=_classification)
    # A config that names classes themselves needs no scope.
    scope = cfg.get('default_scope') or getattr(
        cfg.model.get('type'), '__module__', '').partition('.')[0]
    if scope not in items:
        raise KeyError(f'default_scope must be one of {", ".join(items)}, got {scope!r}')
    found = re.findall(r'"num_(?:things_)?classes": (\d+)',
                       json.dumps(cfg.model.to_dict(), default=str))
    # A region proposal network knows one class, and a model that learns without labels none.
    classes = min(map(int, found), default=1)
    processor = _data_preprocessor(cfg)
    kind = type_name(processor)
    if kind == 'MultiBranchDataPreprocessor':
        item = dict(inputs={}, data_samples={})
        for branch in BRANCHES:
            item['inputs'][branch] = _image(size, rng)
            item['data_samples'][branch] = _detection(cfg, size, rng, classes, _meta(size))
        return item
    if kind == 'TrackDataPreprocessor' and not processor.get('use_det_processor'):
        frames = [_image(size, rng) for _ in range(2)]
        return dict(inputs=torch.stack(frames), data_samples=_video(cfg, size, rng, classes))
    # People stand: models that re-identify them pool maps of twice the height.
    image = _image(size, rng, height=2 * size if kind == 'ReIDDataPreprocessor' else size)
    sample = items[scope](cfg, size, rng, classes, _meta(size))
    return dict(inputs=_views(cfg, image, rng), data_samples=sample)


def noise_batch(cfg: Config, size: int, batch_size: int, rng: np.random.Generator) -> dict:
    """A batch as the data loader of a config would hand it to ``model.train_step``.

    Args:
        cfg (Config): The config, as for :func:`noise_item`.
        size (int): Side of the images, in pixels.
        batch_size (int): Number of items.
        rng (numpy.random.Generator): Draws the images and the labels.

    Returns:
        dict: The items, collated the way the library's own data loaders do it.
    """
    collate = default_collate if cfg.default_scope == 'mmpretrain' else pseudo_collate
    return collate([noise_item(cfg, size, rng) for _ in range(batch_size)])


def _data_preprocessor(cfg: Config) -> dict:
    return cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}


def _image(size: int, rng: np.random.Generator, height: int | None = None) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, (3, height or size, size), dtype=np.uint8))


def _meta(size: int) -> dict:
    return dict(img_shape=(size, size), ori_shape=(size, size), scale_factor=(1., 1.), img_id=0)


def _transforms(cfg: Config) -> Iterator[dict]:
    """The transforms of the training pipeline, those of wrapped data sets included."""
    dataset = (cfg.get('train_dataloader') or {}).get('dataset') or {}
    while dataset:
        yield from (t for t in dataset.get('pipeline') or () if isinstance(t, dict))
        dataset = dataset.get('dataset')


def _views(cfg: Config, image: Tensor, rng: np.random.Generator) -> Tensor | list[Tensor]:
    """The image itself, or as many as the training pipeline would make of it."""
    size = image.size(-1)
    for transform in _transforms(cfg):
        if transform['type'] == 'MultiView':
            counts = transform['num_views']
            total = counts if isinstance(counts, int) else sum(counts)
            return [image, *(_image(size, rng) for _ in range(total - 1))]
        if transform['type'] == 'RandomResizedCropAndInterpolationWithTwoPic':
            second = size * transform.get('second_size', transform['size']) // transform['size']
            return [image, _image(second, rng)]
    return image


def _detection(cfg: Config, size: int, rng: np.random.Generator, classes: int, meta: dict):
    from mmdet.structures import DetDataSample, ReIDDataSample
    from mmdet.structures.mask import BitmapMasks
    processor = _data_preprocessor(cfg)
    kind = type_name(processor)
    if kind == 'ReIDDataPreprocessor':
        return ReIDDataSample(metainfo=meta).set_gt_label(int(rng.integers(0, classes)))
    if kind == 'MultiBranchDataPreprocessor':
        processor = processor['data_preprocessor']
        # How a view of the image was moved against the other branch's: not at all.
        meta['homography_matrix'] = np.eye(3, dtype=np.float32)
    boxes = np.array(BOXES, dtype=np.float32) * size
    instances = InstanceData(
        bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(rng.integers(0, classes, 2)))
    asks = any(node.get('pad_mask') for node in dicts_in(processor))
    if asks or 'mask_head' in cfg.model.get('roi_head', {}):
        masks = np.zeros((2, size, size), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
            mask[y1:y2, x1:x2] = 1
        instances.masks = BitmapMasks(masks, size, size)
    ignored = InstanceData(bboxes=torch.zeros(0, 4))
    sample = DetDataSample(metainfo=meta, gt_instances=instances, ignored_instances=ignored)
    if processor.get('pad_seg'):
        labels = torch.from_numpy(rng.integers(0, classes, (1, size, size)))
        sample.gt_sem_seg = PixelData(sem_seg=labels)
    if 'rpn_head' not in cfg.model:
        # Fast R-CNN reads its proposals from a file.
        sample.proposals = InstanceData(bboxes=instances.bboxes.clone())
    return sample


def _video(cfg: Config, size: int, rng: np.random.Generator, classes: int):
    """Two frames with the same two objects."""
    from mmdet.structures import TrackDataSample
    frames = []
    for index in range(2):
        meta = dict(_meta(size), frame_id=index, key_frame_flag=index == 0)
        frame = _detection(cfg, size, rng, classes, meta)
        frame.gt_instances.instances_ids = torch.arange(2)
        frames.append(frame)
    sample = TrackDataSample(metainfo=dict(key_frames_inds=[0], ref_frames_inds=[1]))
    sample.video_data_samples = frames
    return sample


def _segmentation(cfg: Config, size: int, rng: np.random.Generator, classes: int, meta: dict):
    from mmseg.structures import SegDataSample
    labels = torch.from_numpy(rng.integers(0, classes, (1, size, size)))
    sample = SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels))
    model = json.dumps(cfg.model.to_dict(), default=str)
    if '"PIDHead"' in model:
        sample.gt_edge_map = PixelData(data=torch.from_numpy(rng.integers(0, 2, (1, size, size))))
    if '"DepthEstimator"' in model:
        depth = rng.uniform(1, 5, (1, size, size)).astype(np.float32)
        sample.gt_depth_map = PixelData(data=torch.from_numpy(depth))
    return sample


def _classification(cfg: Config, size: int, rng: np.random.Generator, classes: int, meta: dict):
    from mmpretrain.registry import TRANSFORMS
    from mmpretrain.structures import DataSample
    sample = DataSample(metainfo=meta).set_gt_label(int(rng.integers(0, classes)))
    for transform in _transforms(cfg):
        if str(transform['type']).endswith('MaskGenerator'):
            mask = TRANSFORMS.build(dict(transform, _scope_='mmpretrain')).transform({})['mask']
            sample.set_field(torch.as_tensor(np.asarray(mask)), 'mask')
    return sample
