"""A held-out part of a training set, so that no image of the test decides about a setting."""
from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope

from mmprotune.config_nodes import dicts_in, type_name
from mmprotune.errors import LaunchError

# How many ways to divide a set are tried until each part has an image of every class.
DRAWS = 100


@dataclass
class Split:
    """Where a training set is divided.

    Attributes:
        train (list[int]): Indices of what stays, for ``indices`` of the data set.
        held (list[int]): Indices of what is held out.
        ann_file (str, optional): Annotations of the latter in COCO's format, for evaluators.
        alone (list[str]): Classes that one of the parts lacks, as too few images show them.
    """
    train: list[int]
    held: list[int]
    ann_file: str | None = None
    alone: list[str] = field(default_factory=list)


def make_split(cfg: Config, share: float, folder: Path) -> Split:
    """Divides the training set of a config; the same set is always divided in the same way.

    Args:
        cfg (Config): The config.
        share (float): Which part of the images is held out, between 0 and 1.
        folder (Path): Where ``holdout.json`` goes, and ``holdout_annotations.json`` where an
            evaluator needs it. What is there is taken as it is.

    Returns:
        Split: The division.

    Raises:
        LaunchError: The set cannot be divided.
    """
    file = folder / 'holdout.json'
    if file.is_file():
        split = Split(**json.loads(file.read_text()))
        if split.ann_file:  # the folder may have been moved
            split.ann_file = str((folder / split.ann_file).resolve())
        return split
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    leaf = _leaf(cfg, 'train_dataloader')
    _leaf(cfg, 'val_dataloader')
    _check_evaluator(cfg)
    dataset = DATASETS.build(copy.deepcopy(leaf))
    dataset.full_init()
    count = round(share * len(dataset))
    if count < 2 or len(dataset) - count < 2:
        raise LaunchError(f'--holdout {share:g} of the {len(dataset)} training images is {count}: '
                          'at least 2 must be held out, and 2 stay')
    held, alone = _divide(dataset, leaf, count, share)
    base = _indices_before(leaf, len(dataset))
    kept = sorted(set(range(len(dataset))) - set(held))
    split = Split([base[i] for i in kept], [base[i] for i in held], alone=alone)
    if any('ann_file' in node for node in dicts_in(cfg.val_evaluator)):
        split.ann_file = _write_annotations(dataset, held, folder)
    part = file.with_suffix('.part')
    part.write_text(json.dumps(asdict(split)))
    part.replace(file)
    return make_split(cfg, share, folder)


def hold_out(cfg: Config, split: Split) -> Config:
    """Lets a config train without the held-out images, and validate on them.

    Args:
        cfg (Config): The config; changed in place.
        split (Split): Of :func:`make_split`.

    Returns:
        Config: ``cfg``.
    """
    leaf = _leaf(cfg, 'train_dataloader')
    held = copy.deepcopy(leaf)
    held['indices'] = split.held
    held['pipeline'] = copy.deepcopy(_leaf(cfg, 'val_dataloader')['pipeline'])
    leaf['indices'] = split.train
    cfg.val_dataloader.dataset = held
    for node in dicts_in(cfg.val_evaluator):
        if 'ann_file' in node:
            node['ann_file'] = split.ann_file
    return cfg


def _leaf(cfg: Config, loader: str) -> dict:
    """The data set inside wrappers."""
    dataset = cfg[loader].dataset
    # The set in a KFoldDataset has the images of the validation, too.
    while 'dataset' in dataset and type_name(dataset) != 'KFoldDataset':
        dataset = dataset['dataset']
    if 'dataset' in dataset or 'datasets' in dataset:
        raise LaunchError(f'{loader}.dataset must be one data set, in wrappers or not, so that a '
                          f'part can be held out, got {type_name(dataset)}; or name one learning '
                          'rate (--lrs), which needs no sweep')
    return dataset


def _check_evaluator(cfg: Config) -> None:
    for node in dicts_in(cfg.val_evaluator):
        if node.get('seg_prefix'):
            raise LaunchError(f'val_evaluator {type_name(node)} reads label images below '
                              'seg_prefix, which a held-out part has not; name one learning rate '
                              '(--lrs), which needs no sweep')


def _indices_before(leaf: dict, count: int) -> Sequence[int]:
    """What the set's own ``indices`` stand for."""
    own = leaf.get('indices')
    if own is None or isinstance(own, int) and own >= 0:
        return range(count)
    if isinstance(own, int):
        total = len(DATASETS.build(dict(copy.deepcopy(leaf), indices=None)))
        return range(total - count, total)
    return list(own)


def _divide(dataset, leaf: dict, count: int, share: float) -> tuple[list[int], list[str]]:
    """Draws what is held out, so that both parts show each class that two images show."""
    labels = _labels(dataset, leaf)
    names = (dataset.metainfo or {}).get('classes') or ()
    shown = np.zeros((len(dataset), max([len(names), *(max(one, default=-1) + 1
                                                       for one in labels)])), dtype=bool)
    for row, one in zip(shown, labels):
        row[list(one)] = True
    often = shown.sum(0) >= 2
    for seed in range(DRAWS):
        order = np.random.default_rng(seed).permutation(len(dataset))
        held, kept = order[:count], order[count:]
        if (shown[held].any(0) & shown[kept].any(0))[often].all():
            break
    else:
        held = np.array(_covering(shown, often, count))
    if len(held) > count:
        raise LaunchError(f'--holdout {share:g}: {count} of {len(dataset)} images do not show '
                          f'every class; {len(held)} can, --holdout '
                          f'{math.ceil(100 * len(held) / len(dataset)) / 100:g}')
    kept = np.setdiff1d(np.arange(len(dataset)), held)
    alone = shown.any(0) & ~(shown[held].any(0) & shown[kept].any(0))
    return sorted(held.tolist()), [str(names[i]) if i < len(names) else str(i)
                                   for i in np.flatnonzero(alone)]


def _covering(shown: np.ndarray, often: np.ndarray, count: int) -> list[int]:
    """Holds out an image of every class first, the rarest before others, and then any.

    Args:
        shown (numpy.ndarray): Which image (N) shows which class (C).
        often (numpy.ndarray): Which classes (C) both parts have to show.
        count (int): How many images to hold out.

    Returns:
        list[int]: Indices; more than ``count`` where the classes take more.
    """
    left, held = shown.sum(0), []

    def take(images: np.ndarray) -> None:
        for i in images:
            if i not in held and (left - shown[i] >= 1)[shown[i] & often].all():
                held.append(int(i))
                left[:] -= shown[i]
                return

    for label in sorted(np.flatnonzero(often), key=left.__getitem__):
        lacking = often & ~shown[held].any(0)
        if lacking[label]:
            own = np.flatnonzero(shown[:, label])
            take(own[np.argsort(-shown[own][:, lacking].sum(1), kind='stable')])
    if len(held) < count:
        for i in np.random.default_rng(0).permutation(len(shown)):
            if len(held) < count:
                take([i])
    return held


def _labels(dataset, leaf: dict) -> list[set[int]]:
    """The classes that each image shows; empty sets for data sets that do not tell."""
    with contextlib.suppress(NotImplementedError):  # data sets of label maps
        return [{int(label) for label in dataset.get_cat_ids(i)} for i in range(len(dataset))]
    step = next((step for step in leaf.get('pipeline') or ()
                 if type_name(step) == 'LoadAnnotations'), None)
    if step is None or not dataset.get_data_info(0).get('seg_map_path'):
        return [set()] * len(dataset)
    load = TRANSFORMS.build(copy.deepcopy(step))
    found, classes = [], len(dataset.metainfo.get('classes') or ())
    for i in range(len(dataset)):
        labels = np.unique(load(dataset.get_data_info(i))['gt_seg_map'])
        found.append({int(label) for label in labels if label < classes})
    return found


def _write_annotations(dataset, held: list[int], folder: Path) -> str:
    """Writes the part of an annotation file in COCO's format that is about the held-out images;
    returns its name."""
    source = getattr(dataset, 'ann_file', None)
    try:
        content = json.loads(Path(source).read_text(encoding='utf-8'))
        ids = {dataset.get_data_info(i)['img_id'] for i in held}
        content['images'] = [one for one in content['images'] if one['id'] in ids]
        content['annotations'] = [one for one in content['annotations']
                                  if one['image_id'] in ids]
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise LaunchError(f'val_evaluator.ann_file: the held-out part needs one of its own, but '
                          f'{source!r} of train_dataloader.dataset is not in COCO format: '
                          f'{error!r}') from error
    file = folder / 'holdout_annotations.json'
    file.write_text(json.dumps(content), encoding='utf-8')
    return file.name
