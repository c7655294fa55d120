
import pytest
import torch
from torch.nn import functional as F

from mmprotune.lean import functional as lean
from mmprotune.lean.functional import activations
from mmprotune.lean.graph import LeanState
from tests.test_lean.functions import draw, kept


@pytest.mark.parametrize('affine', [True, False])
def test_batch_norm(affine):
    mean, var = draw(3, seed=1), draw(3, seed=2).abs() + 0.1
    weight, bias = (draw(3, seed=3), draw(3, seed=4)) if affine else (None, None)
    x = draw(2, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.batch_norm(x, mean, var, weight, bias), x)
    stock = F.batch_norm(x, mean, var, weight, bias, False)
    assert torch.equal(lean.batch_norm(x, mean, var, weight, bias), stock)
    assert kept(lambda x: lean.batch_norm(x, mean, var, weight, bias), x) <= 48


def test_layer_norm():
    weight, bias = draw(6, seed=1), draw(6, seed=2)
    x = draw(2, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.layer_norm(x, (6, ), weight, bias), x)
    assert torch.autograd.gradcheck(lambda x: lean.layer_norm(x, (5, 6)), x)
    stock = F.layer_norm(x, (6, ), weight, bias)
    assert torch.equal(lean.layer_norm(x, (6, ), weight, bias), stock)
    moved = x.detach().transpose(0, 1).requires_grad_()  # not contiguous
    assert torch.autograd.gradcheck(lambda x: lean.layer_norm(x, (6, ), weight, bias), moved)


def test_group_norm():
    weight, bias = draw(6, seed=1), draw(6, seed=2)
    x = draw(2, 6, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.group_norm(x, 3, weight, bias), x)
    assert torch.equal(lean.group_norm(x, 3, weight, bias), F.group_norm(x, 3, weight, bias))
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.group_norm(x, 3, weight, bias), last)
    assert kept(lambda x: lean.group_norm(x, 3, weight, bias), x) == (
        x.nbytes + weight.nbytes + bias.nbytes)


def test_a_norm_and_what_follows_keep_one_tensor():
    norm_weight, matrix = draw(4, seed=1), draw(16, 4, seed=2)

    def function(x):
        y = lean.layer_norm(x, (4, ), norm_weight)
        return lean.activation(lean.linear(y, matrix, None, LeanState()), activations.GELU)

    x = draw(2, 7, 4).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    statistics = 2 * 2 * 7 * 8
    assert kept(function, x) == x.nbytes + statistics + norm_weight.nbytes
