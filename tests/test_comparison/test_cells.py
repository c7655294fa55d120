"""What the config of a cell says."""
import pytest
import torch
from mmengine.config import Config

from mmprotune.comparison.cells import cell_config, run_cell, saved_bytes, set_rate
from mmprotune.comparison.methods import Method
from mmprotune.comparison.plan import Cell
from mmprotune.errors import LaunchError

from ..detection import detector_cfg, draw_coco


@pytest.mark.parametrize('schedule, key, rate', [
    (dict(type='CosineAnnealingLR', eta_min=1e-5), 'eta_min', 1e-4),
    (dict(type='OneCycleLR', eta_max=1e-3), 'eta_max', 1e-2),
    (dict(type='CosineAnnealingMomentum', eta_min=0.8), 'eta_min', 0.8)])
def test_schedules_keep_their_shape(schedule, key, rate):
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)),
                      param_scheduler=[dict(type='LinearLR', start_factor=0.1), schedule]))
    set_rate(cfg, 1e-2)
    assert cfg.optim_wrapper.optimizer.lr == 1e-2
    assert cfg.param_scheduler[1][key] == pytest.approx(rate)
    assert cfg.param_scheduler[0].start_factor == 0.1


def test_a_detector_that_finds_nothing_is_told(tmp_path):
    """mmdet's metric reports nothing then."""
    draw_coco(tmp_path)
    cfg = detector_cfg(dict(type='mmdet.ResNet', depth=18, base_channels=8), tmp_path, tmp_path,
                       custom_hooks=[], train_cfg=dict(max_epochs=1))
    cfg.model.test_cfg.rcnn.score_thr = 1.1
    with pytest.raises(LaunchError, match='the validation reports no number'):
        run_cell(cfg, Method('full', None), Cell('final', 'full', 1e-3, 0), None,
                 str(tmp_path / 'log'))


def test_what_heads_share_is_saved_once(tmp_path):
    first, second = torch.nn.Linear(40, 50), torch.nn.Linear(40, 50)
    second.weight = first.weight
    state = torch.nn.ModuleList([first, second]).state_dict()
    assert saved_bytes(state) == 4 * (40 * 50 + 2 * 50)
    torch.save(state, tmp_path / 'weights.pth')
    assert (tmp_path / 'weights.pth').stat().st_size < 1.5 * saved_bytes(state)


def test_evaluators_of_two_runs_share_no_file():
    evaluators = [dict(type='CocoMetric', outfile_prefix='results/val'), dict(type='VOCMetric'),
                  dict(type='CityscapesMetric', output_dir='results')]
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-3)), train_cfg={},
                      val_evaluator=evaluators))
    found = [cell_config(cfg, Method('full', None), Cell('final', 'full', 1e-3, seed), None,
                         f'logs/{seed}').val_evaluator for seed in (0, 1)]
    for seed, (coco, voc, cityscapes) in enumerate(found):
        assert coco.outfile_prefix == f'logs/{seed}/evaluator0'
        assert voc == evaluators[1]
        assert cityscapes.output_dir == f'logs/{seed}/evaluator2'
    assert cfg.val_evaluator[0].outfile_prefix == 'results/val'
