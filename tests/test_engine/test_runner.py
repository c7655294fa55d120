"""What building a Runner adds."""
from __future__ import annotations

import logging

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmprotune.engine import runner as engine_runner


def test_data_loaders_of_mmpretrain():
    cfg = Config(dict(
        train_dataloader=dict(batch_size=2, num_workers=2),
        val_dataloader=dict(num_workers=0, pin_memory=False), test_dataloader=None))
    engine_runner._set_dataloader_defaults(cfg)
    collate = dict(type='default_collate')
    assert cfg.train_dataloader == dict(
        batch_size=2, num_workers=2, pin_memory=True, persistent_workers=True, collate_fn=collate)
    assert cfg.val_dataloader == dict(
        num_workers=0, pin_memory=False, persistent_workers=False, collate_fn=collate)
    assert cfg.test_dataloader is None


def test_frozen_parameters_are_told_of_once():
    logger = MMLogger.get_instance('test_frozen_parameters_are_told_of_once')
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    logger.addFilter(engine_runner._OneFrozenNotice())

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[:2].requires_grad_(False)
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='SGD', lr=1., weight_decay=1.),
        paramwise_cfg=dict(bias_decay_mult=0.)))
    optimized = {id(param) for group in wrapper.param_groups for param in group['params']}
    assert {id(param) for param in model.parameters()} & optimized == {
        id(param) for param in model[2].parameters()}
    assert [line for line in lines if 'frozen' in line[1]] == [
        ('INFO', 'optimizer: frozen parameters are left out')]
    assert not any('skipped' in message for _, message in lines)
    assert any('paramwise_options' in message for _, message in lines)
