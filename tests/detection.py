"""A detector small enough to be trained inside a test: mmdet's Faster R-CNN on drawn squares."""
from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from tests.test_tools.conftest import SIZE, draw_coco

CLASSES = ('square', 'other')


def detector_cfg(backbone: dict, data: Path, work_dir: Path, **options) -> Config:
    """Config of a whole run; ``options`` are merged in last.

    Args:
        backbone (dict): ``model.backbone``; feature channels 8, 16, 32, 64.
        data (Path): Folder that :func:`draw_coco` filled.
        work_dir (Path): Of the run.
    """
    cfg = Config.fromfile(str(Path(__file__).parent / 'faster_rcnn_tiny.py'))
    cfg.model.backbone = copy.deepcopy(backbone)
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[loader].dataset.data_root = str(data)
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(data / 'ann.json')
    cfg.work_dir = str(work_dir)
    cfg.merge_from_dict(options)
    return cfg


def run(cfg: Config, train: bool = True) -> Runner:
    """Trains (or tests) in this process; returns the Runner with its model."""
    cfg = copy.deepcopy(cfg)
    # Runners of one process share loggers, message hubs and visualizers by name.
    run.count += 1
    cfg.experiment_name = cfg.visualizer.name = f'test-{run.count}'
    runner = Runner.from_cfg(cfg)
    runner.train() if train else runner.test()
    return runner


run.count = 0

__all__ = ['CLASSES', 'SIZE', 'detector_cfg', 'draw_coco', 'run']
