from __future__ import annotations

import argparse
import json
import pathlib
import pickle

import pytest
import torch
from mmengine.config import Config

from mmprotune.engine import cli
from mmprotune.errors import LaunchError

from .conftest import load_tool

tool = load_tool('test.py')


def metrics(folder: pathlib.Path) -> dict:
    return json.loads(next(folder.glob('*/*.json')).read_text())


def test_slim_checkpoint_gives_the_numbers_of_training(project, trained, tmp_path):
    tool.main([
        project.prompted, trained, '--work-dir',
        str(tmp_path), '--out',
        str(tmp_path / 'all.pkl'), '--show-dir', 'drawn'])
    lines = next(pathlib.Path(trained).parent.glob('*/vis_data/scalars.json')).read_text()
    validated = [json.loads(line) for line in lines.splitlines() if 'coco/' in line][-1]
    tested = metrics(tmp_path)
    compared = [key for key in validated if key.startswith('coco/')]
    assert len(compared) == 12
    assert {key: tested[key] for key in compared} == {key: validated[key] for key in compared}

    predictions = pickle.loads((tmp_path / 'all.pkl').read_bytes())
    assert [sample['img_id'] for sample in predictions] == [0, 1, 2, 3]
    assert 'scores' in predictions[0]['pred_instances']
    assert len(list(tmp_path.glob('*/drawn/*.png'))) == 4


@pytest.mark.parametrize(('argv', 'message'), [
    (['config', 'none.pth'], "checkpoint: no file 'none.pth'"),
    (['config', 'checkpoint', '--out', 'a.json'], "--out must end with .* got 'a.json'"),
])
def test_wrong_arguments(argv, message):
    with pytest.raises(LaunchError, match=message):
        tool.main(argv)


def test_a_config_without_a_test_set(tmp_path):
    config, weights = tmp_path / 'config.py', tmp_path / 'weights.pth'
    config.write_text("default_scope = 'mmpretrain'\nmodel = dict(type='ImageClassifier')\n")
    torch.save(dict(state_dict={}), weights)
    with pytest.raises(LaunchError, match='test_dataloader: the config names no test set'):
        tool.main([str(config), str(weights)])


@pytest.mark.parametrize(('host', 'hook', 'expected'), [
    ('mmdet', 'DetVisualizationHook', dict(draw=True, test_out_dir='d')),
    ('mmseg', 'SegVisualizationHook', dict(draw=True)),
    ('mmpretrain', 'VisualizationHook', dict(enable=True, out_dir='d')),
])
def test_drawing_hooks(host, hook, expected):
    pytest.importorskip(host)
    cfg = Config(dict(
        default_scope=host, visualizer=dict(type='V'),
        default_hooks=dict(visualization=dict(type=hook, _scope_=host))))
    tool.draw_predictions(cfg, argparse.Namespace(show=True, show_dir='d', wait_time=3))
    assert cfg.default_hooks.visualization == dict(
        type=hook, _scope_=host, interval=1, show=True, wait_time=3, **expected)
    assert cfg.visualizer.get('save_dir') == (None if len(expected) == 2 else 'd')


def test_drawing_needs_a_hook():
    args = argparse.Namespace(show=True, show_dir=None, wait_time=2)
    with pytest.raises(LaunchError, match='default_hooks.visualization'):
        tool.draw_predictions(Config(dict(default_hooks=dict())), args)
    cfg = Config(dict(default_scope='mmdet', default_hooks=dict(visualization=dict(type='None'))))
    with pytest.raises(LaunchError, match="'None' is not registered"):
        tool.draw_predictions(cfg, args)


def test_tta(project, trained, tmp_path):
    """A Faster R-CNN, as mmdet merges boxes only."""
    config = project.write(
        'boxes.py', f"""
        _base_ = {project.prompted!r}
        model = dict(roi_head=dict(
            type='StandardRoIHead', mask_roi_extractor=None, mask_head=None))
        test_evaluator = dict(metric='bbox')
        custom_hooks = []
        """)
    cfg = cli.load_config(config)
    tool.use_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    *_, augment = cfg.test_dataloader.dataset.pipeline
    assert [len(branch) for branch in augment.transforms] == [2, 1]
    assert 'flip' in augment.transforms[1][0].meta_keys

    tool.main([config, trained, '--work-dir', str(tmp_path / 'tta'), '--tta'])
    tool.main([config, trained, '--work-dir', str(tmp_path / 'plain')])
    flipped, plain = metrics(tmp_path / 'tta'), metrics(tmp_path / 'plain')
    assert flipped.keys() == plain.keys()
    assert flipped['coco/bbox_mAP'] > 0


def test_tta_of_the_config_goes_first():
    pipeline = [dict(type='A')]
    cfg = Config(dict(
        default_scope='mmseg', tta_pipeline=pipeline, tta_model=dict(type='Own', a=1),
        model=dict(type='M'), test_dataloader=dict(dataset=dict(type='R', dataset=dict(type='D')))))
    tool.use_tta(cfg)
    assert cfg.model == dict(type='Own', a=1, module=dict(type='M'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == pipeline


def test_tta_of_an_unknown_library():
    cfg = Config(dict(default_scope='own', test_dataloader=dict(dataset=dict(pipeline=[]))))
    with pytest.raises(LaunchError, match="default_scope='own'"):
        tool.use_tta(cfg)


def test_predictions_are_written_without_logits(tmp_path):
    metric = tool.DumpSegResults(out_file_path=str(tmp_path / 'a.pkl'))
    sample = dict(seg_logits=1, pred_sem_seg=2)
    metric.process({}, [sample])
    assert metric.results == [dict(pred_sem_seg=2)]
    assert sample['seg_logits'] == 1  # other metrics get it
