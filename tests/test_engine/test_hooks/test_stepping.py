"""Hooks before a step, kept where PyTorch loses its own."""
import pytest
import torch
from mmengine import optim
from torch.optim import lr_scheduler

from mmprotune.engine.hooks import stepping


@pytest.mark.parametrize('scheduler', [lr_scheduler.StepLR, optim.StepLR])
@pytest.mark.parametrize('earlier', [True, False])
def test_a_scheduler_made_before_or_after(monkeypatch, scheduler, earlier):
    monkeypatch.setattr(stepping, 'TORCH_LOSES_HOOKS', True)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.)
    made = [scheduler(optimizer, 1)] if earlier else []
    seen = []
    handle = stepping.before_step(optimizer, lambda *args: seen.append(args))
    made = made or [scheduler(optimizer, 1)]
    parameter.grad = torch.ones(2)
    optimizer.step()
    made[0].step()
    assert seen == [(optimizer, (), {})] and torch.equal(parameter, torch.zeros(2))
    handle.remove()
    optimizer.step()
    assert len(seen) == 1
