"""What the config of a cell says."""
import pytest
from mmengine.config import Config

from mmprotune.comparison.cells import set_rate


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
