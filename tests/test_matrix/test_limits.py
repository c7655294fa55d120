"""What ends the process of a check, and what that says."""
import json

import pytest

from mmprotune.engine.hooks.stepping import before_step
from mmprotune.matrix import limits, stock
from tests.test_matrix.conftest import SMALL, check


def spin(*args):
    while True:
        pass


def leave(*args):
    import os
    os._exit(3)


def too_much(*args):
    bytearray(10**15)


@pytest.mark.parametrize('body, reason', [
    (spin, 'not within 1 s'), (leave, 'the process ended with status 3:'),
    (too_much, 'not within 99 GB'), (lambda *args: {}['x'], "KeyError: 'x'")
])
def test_a_stock_model_that_ends_badly_says_nothing_about_prompts(monkeypatch, body, reason):
    monkeypatch.setattr(limits, 'check_stock', body)
    result = check(SMALL, seconds=1, memory=99)
    assert (result['verdict'], result['reason']) == ('host', reason)
    monkeypatch.setattr(limits, 'check_stock', lambda *args: dict(size=64, finite=True))
    monkeypatch.setattr(limits, 'check_stock_step', lambda *args: {})
    monkeypatch.setattr(limits, 'check_prompted', body)
    result = check(SMALL, seconds=1, memory=99)
    assert (result['verdict'], result['reason'], result['size']) == ('fail', reason, 64)
    assert json.dumps(result)


def test_a_stock_model_that_takes_no_step_says_nothing_about_prompts(monkeypatch):
    """Its losses were computed, but the prompted model's failure may be its own."""
    monkeypatch.setattr(limits, 'check_prompted', lambda *args: dict(faults=['no step']))
    assert check(SMALL)['verdict'] == 'fail'
    update = stock.build_optim_wrapper

    def build(*args):
        wrapper = update(*args)
        before_step(wrapper.optimizer, lambda *args: {}['x'])
        return wrapper

    monkeypatch.setattr(stock, 'build_optim_wrapper', build)
    result = check(SMALL)
    assert (result['verdict'], result['reason']) == ('host', "KeyError: 'x'")
