"""Functions that see gradients before a step."""
import subprocess
import sys

import pytest
import torch
from mmengine.optim import LinearLR, OptimWrapper

from mmprotune.engine.hooks import stepping
from mmprotune.engine.hooks.stepping import before_step


@pytest.fixture(params=[False, True], ids=['own hooks', 'a step that is watched'])
def parameter(request, monkeypatch):
    # Where PyTorch loses them, both are the second.
    monkeypatch.setattr(stepping, 'TORCH_LOSES_HOOKS', stepping.TORCH_LOSES_HOOKS or request.param)
    return torch.nn.Parameter(torch.ones(2))


def test_before_each_step_until_removed(parameter):
    optimizer, seen = torch.optim.SGD([parameter], lr=0.5), []
    wrapped = OptimWrapper(optimizer)
    schedule = LinearLR(wrapped, start_factor=1.)
    first, second = (before_step(optimizer, lambda o, args, kwargs, i=i: seen.append(
        (i, o is optimizer, parameter.grad.tolist(), parameter.tolist()))) for i in (0, 1))
    wrapped.update_params(parameter.sum())
    assert seen == [(i, True, [1., 1.], [1., 1.]) for i in (0, 1)]
    assert parameter.tolist() == [0.5, 0.5]
    schedule.step()

    first.remove()
    wrapped.update_params(parameter.sum())
    assert [i for i, *_ in seen] == [0, 1, 1]
    second.remove()
    wrapped.update_params(parameter.sum())
    assert len(seen) == 3 and parameter.tolist() == [-0.5, -0.5]
    assert set(optimizer.state_dict()) == {'state', 'param_groups'}


def test_an_error_stops_the_step(parameter):
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    before_step(optimizer, lambda *args: {}['x'])
    parameter.grad = torch.ones(2)
    with pytest.raises(KeyError):
        optimizer.step()
    assert parameter.tolist() == [1., 1.]


def test_what_is_compiled_takes_none_away():
    """In a process of its own: one that has compiled and gone backward may not fork."""
    script = """
import torch
from mmprotune.engine.hooks.stepping import before_step

parameter = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([parameter], lr=0.5)
before_step(optimizer, lambda *args: print('seen', parameter.tolist()))
torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1))
parameter.grad = torch.ones(2)
optimizer.step()
"""
    ended = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], capture_output=True,
                           text=True, check=True)
    assert ended.stdout.splitlines()[-1] == 'seen [1.0, 1.0]'
