
import pytest
import torch

from mmprotune.lean import functional as lean
from mmprotune.lean.functional import activations
from tests.test_lean.functions import draw, kept, settings

FUNCTIONS = {
    'convolution': lambda x: lean.convolution(x, torch.ones(2, 3, 3, 3), None, settings()),
    'batch norm': lambda x: lean.batch_norm(x, torch.zeros(3), torch.ones(3)),
    'layer norm': lambda x: lean.layer_norm(x, x.shape[-1:]),
    'group norm': lambda x: lean.group_norm(x, 3),
    'relu': lean.relu,
    'activation': lambda x: lean.activation(x, activations.GELU),
    'max': lambda x: lean.max_pool2d(x, 2),
    'average': lambda x: lean.avg_pool2d(x, 2),
    'replayed': lambda x: lean.replayed(torch.sin, x),
    'linear': lambda x: lean.linear(x, torch.ones(2, x.size(-1))),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_nothing_is_kept_without_a_graph(name):
    x = draw(2, 3, 8, 8, dtype=torch.float32)
    assert kept(FUNCTIONS[name], x) == 0
    with torch.no_grad():
        assert kept(FUNCTIONS[name], x.requires_grad_()) == 0
    assert kept(FUNCTIONS[name], x) >= 0 and FUNCTIONS[name](x).requires_grad


@pytest.mark.parametrize('name', FUNCTIONS)
def test_empty_inputs(name):
    x = torch.zeros(0, 3, 8, 8, requires_grad=True)
    y = FUNCTIONS[name](x)
    y.sum().backward()
    assert x.grad.shape == x.shape and y.size(0) == 0


@pytest.mark.parametrize('name', FUNCTIONS)
def test_no_second_derivative(name):
    x = draw(2, 3, 8, 8, dtype=torch.float32).requires_grad_()
    y = FUNCTIONS[name](x)
    grad, = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
