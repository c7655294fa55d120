"""Configs of the runs that are broken on purpose here: real detectors, real training."""
from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.hub import get_config

from tests.conftest import RESNET18
from tests.detection import detector_cfg


def prompted(weights: str, **options) -> dict:
    """Config of a prompted backbone with a pre-trained file."""
    backbone = dict(RESNET18, init_cfg=dict(type='Pretrained', checkpoint=weights))
    return {'type': 'mmprotune.PromptedBackbone', 'backbone': backbone, **options}


def atss_cfg(backbone: dict, data: Path, work_dir: Path, **options) -> Config:
    """A whole run of mmdet's ATSS: its loss is normalised over all processes, so that two of them
    with one image each compute what one with two computes; and it trains without NMS, which CPU
    autocast could not run."""
    cfg = detector_cfg(backbone, data, work_dir)
    model = get_config('mmdet::atss/atss_r50_fpn_1x_coco.py').model
    model.backbone = copy.deepcopy(cfg.model.backbone)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=32)
    model.bbox_head.update(num_classes=2, in_channels=32, feat_channels=32, stacked_convs=1,
                           norm_cfg=dict(type='GN', num_groups=8, requires_grad=True))
    cfg.model = model
    cfg.merge_from_dict(options)
    return cfg
