"""Tiny detectors, segmentors and classifiers on one frozen backbone, as slim files with configs."""
from __future__ import annotations

import copy
import functools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from tests.classification import CLASSES, classifier_cfg
from tests.conftest import RESNET18, wake

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
SCALE = (64, 64)
HOSTS = dict(detector='mmdet', segmentor='mmseg', classifier='mmpretrain')


def backbone(file: str, insert: str | None = 'stages', lean: bool = False, **options) -> dict:
    """A prompted ResNet-18 of an eighth of the width; ``insert`` None means no prompts."""
    where = dict(prompt=None) if insert is None else dict(
        prompt=dict(type='mmprotune.PromptBlock'), insert=insert)
    inner = dict(RESNET18, init_cfg=dict(type='Pretrained', checkpoint=str(file)),
                 **options.pop('inner', {}))
    return dict(type='mmprotune.PromptedBackbone', backbone=inner, lean=lean, **where, **options)


def task_cfg(kind: str, prompted: dict, mean=MEAN, scale=SCALE) -> Config:
    """Config of a whole run; preprocessings of all kinds agree.

    Args:
        kind (str): A key of ``HOSTS``.
        prompted (dict): ``model.backbone``.
    """
    resize = dict(type='Resize', scale=scale, keep_ratio=True)
    if kind == 'detector':
        cfg = Config.fromfile(str(Path(__file__).parents[1] / 'faster_rcnn_tiny.py'))
        cfg.model.data_preprocessor.update(mean=mean, std=STD, pad_size_divisor=1)
        cfg.test_dataloader.dataset.pipeline[1] = resize
    elif kind == 'segmentor':
        steps = [dict(type='LoadImageFromFile'), resize, dict(type='LoadAnnotations'),
                 dict(type='PackSegInputs')]
        cfg = Config(dict(
            model=dict(
                type='EncoderDecoder',
                data_preprocessor=dict(type='SegDataPreProcessor', mean=mean, std=STD,
                                       bgr_to_rgb=True, pad_val=0, seg_pad_val=255),
                decode_head=dict(type='FCNHead', in_channels=64, in_index=3, channels=8,
                                 num_convs=1, num_classes=3, norm_cfg=dict(type='BN')),
                train_cfg=dict(), test_cfg=dict(mode='whole')),
            test_pipeline=steps,
            test_dataloader=dict(dataset=dict(type='CityscapesDataset', pipeline=steps))))
    else:
        model = classifier_cfg(prompted)
        model['data_preprocessor']['mean'] = mean
        steps = [dict(type='LoadImageFromFile'), resize,
                 dict(type='PackInputs')]
        cfg = Config(dict(model=model, test_dataloader=dict(
            dataset=dict(type='CustomDataset', pipeline=steps))))
    cfg.default_scope = HOSTS[kind]
    cfg.model.backbone = copy.deepcopy(prompted)
    return cfg


def save_task(path: Path, kind: str, prompted: dict, seed: int = 0, full: bool = False,
              **options) -> str:
    """Writes what training would leave behind: weights that act, and the config in the meta."""
    cfg = task_cfg(kind, prompted, **options)
    torch.manual_seed(seed)
    model = build_model(cfg)
    wake(model, seed)
    state_dict = checkpoint.full_state_dict(model) if full else model.state_dict()
    classes = CLASSES if kind == 'classifier' else ('a', 'b', 'c')[:2 + (kind == 'segmentor')]
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=classes),
                mmprotune=checkpoint.describe_model(model))
    torch.save(dict(meta=meta, state_dict=state_dict), path)
    return str(path)


@functools.lru_cache(maxsize=32)
def _inferencer(path: str):
    cfg = Config.fromstring(torch.load(path, weights_only=True)['meta']['cfg'], '.py')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        if cfg.default_scope == 'mmdet':
            from mmdet.apis import inference_detector, init_detector
            return partial(inference_detector, init_detector(cfg, path, 'coco', device='cpu'))
        if cfg.default_scope == 'mmseg':
            from mmseg.apis import inference_model, init_model
            return partial(inference_model, init_model(cfg, path, device='cpu'))
        from mmpretrain.apis import ImageClassificationInferencer
        inferencer = ImageClassificationInferencer(cfg, path, device='cpu')
        return lambda image: inferencer(image, return_datasamples=True)[0]


def alone(path: str, image):
    """What the host's own inferencer returns for one image; built and run apart."""
    run = _inferencer(path)
    # They build transforms anew; mmseg's puts the one for arrays into the model's config for good.
    host = getattr(run, 'args', [None])[0]
    before = None if host is None else copy.deepcopy(host.cfg)
    with DefaultScope.overwrite_default_scope(
            'mmpretrain' if host is None else host.cfg.default_scope):
        found = run(image)
    if host is not None:
        host.cfg = before
    return found


def values(sample) -> dict:
    """Everything in a data sample, by dotted name."""
    found = {}

    def visit(name, value):
        if hasattr(value, 'all_items'):
            for key, inner in (*value.all_items(), ):
                visit(f'{name}.{key}', inner)
        elif hasattr(value, 'tensor'):
            found[name] = value.tensor
        else:
            found[name] = value

    visit('', sample)
    return found


def same(first, second) -> bool:
    """Whether two results are equal to the last bit, meta data included."""
    a, b = values(first), values(second)
    if a.keys() != b.keys() or type(first) is not type(second):
        return False

    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        if isinstance(x, np.ndarray):
            return np.array_equal(x, y)
        return type(x) is type(y) and x == y

    return all(equal(a[key], b[key]) for key in a)


def picture(seed: int = 0, size=(64, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
