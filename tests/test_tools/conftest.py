"""A drawn COCO-format set and configs small enough to be trained inside a test."""
from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import cv2
import numpy as np
import pytest
from mmengine.visualization import Visualizer

REPO = pathlib.Path(__file__).resolve().parents[2]
SIZE = 64  # pixels


def draw_coco(folder: pathlib.Path, images: int = 4) -> None:
    """Writes ``images`` pictures with one square each, and ``ann.json``."""
    rng = np.random.default_rng(0)
    content = dict(
        images=[], annotations=[],
        categories=[dict(id=1, name='square'), dict(id=2, name='other')])
    for i in range(images):
        picture = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        x, y = (int(v) for v in rng.integers(4, 24, 2))
        picture[y:y + 32, x:x + 32] = 220
        cv2.imwrite(str(folder / f'{i}.png'), picture)
        content['images'].append(dict(id=i, file_name=f'{i}.png', width=SIZE, height=SIZE))
        content['annotations'].append(
            dict(id=i + 1, image_id=i, category_id=1, iscrowd=0, area=32 * 32,
                 bbox=[x, y, 32, 32],
                 segmentation=[[x, y, x + 32, y, x + 32, y + 32, x, y + 32]]))
    (folder / 'ann.json').write_text(json.dumps(content))


CONFIG = """
_base_ = {base!r}
classes = ('square', 'other')
model = dict(
    backbone={backbone},
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=32),
    rpn_head=dict(in_channels=32, feat_channels=32),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=32, num_classes=2),
        mask_roi_extractor=dict(out_channels=32),
        mask_head=dict(in_channels=32, conv_out_channels=32, num_classes=2)))
data = dict(
    data_root={data!r}, ann_file='ann.json', data_prefix=dict(img=''),
    metainfo=dict(classes=classes))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=({size}, {size}), keep_ratio=True),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=({size}, {size}), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False,
    dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline, **data))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data!r} + '/ann.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=10)
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=1))
"""
PROMPTED = "dict(freeze='all', backbone=dict(depth=18, init_cfg=None))"
STOCK = 'dict(depth=18, init_cfg=None)'


class Project:
    """A folder with a data set and the two configs ``prompted.py`` and ``stock.py``."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        draw_coco(folder)
        self.prompted = self._config('prompted.py', 'mask_rcnn_r50_protune_coco.py', PROMPTED)
        self.stock = self._config('stock.py', 'mask_rcnn_r50_full_coco.py', STOCK)

    def _config(self, name: str, base: str, backbone: str) -> str:
        path = self.folder / name
        path.write_text(
            CONFIG.format(
                base=str(REPO / 'configs' / base), backbone=backbone, data=str(self.folder),
                size=SIZE))
        return str(path)

    def write(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return str(path)


def load_tool(name: str):
    """A script of ``tools/`` as a module."""
    spec = importlib.util.spec_from_file_location(
        f'tools_{pathlib.Path(name).stem}', REPO / 'tools' / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _fresh_process(monkeypatch):
    """Undoes what tools leave behind in a process: variables, and the visualizer of a name."""
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv('MMPROTUNE_DEBUG', raising=False)
    _forget_visualizers()


def _forget_visualizers() -> None:
    """A later run in one process would go on writing into the folder of the first."""
    for cls in (Visualizer, *Visualizer.__subclasses__()):
        cls._instance_dict.clear()


@pytest.fixture(scope='session')
def project(tmp_path_factory) -> Project:
    return Project(tmp_path_factory.mktemp('project'))


@pytest.fixture(scope='session')
def trained(project) -> str:
    """Checkpoint of one epoch (4 iterations) of the prompted config."""
    _forget_visualizers()
    load_tool('train.py').main([
        project.prompted, '--work-dir',
        str(project.folder / 'trained'), '--cfg-options', 'train_cfg.val_interval=1'
    ])
    _forget_visualizers()
    return str(project.folder / 'trained' / 'epoch_1.pth')


@pytest.fixture
def run_command(tmp_path):
    """Runs a command in an empty folder, as a user would, with this checkout on the path."""

    def run(*command: str, **env: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')]))
        # A session of its own: whatever a launcher started goes with it when time is up.
        process = subprocess.Popen(
            [str(part) for part in command], cwd=tmp_path, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, 'PYTHONPATH': path, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1',
                 'CUDA_VISIBLE_DEVICES': '', **env})
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
