
import pytest
import torch
from torch.nn import functional as F

from mmprotune.lean import functional as lean
from tests.test_lean.functions import draw, kept

POOLS = {
    'max': (lambda x: lean.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)),
    'max, ceil': (lambda x: lean.max_pool2d(x, 2, 2, ceil_mode=True),
                  lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True)),
    'max, dilated': (lambda x: lean.max_pool2d(x, (2, 3), 1, (1, 1), (2, 1)),
                     lambda x: F.max_pool2d(x, (2, 3), 1, (1, 1), (2, 1))),
    'average': (lambda x: lean.avg_pool2d(x, 3, 2, 1), lambda x: F.avg_pool2d(x, 3, 2, 1)),
    'average, ceil': (lambda x: lean.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
                      lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)),
    'adaptive': (lambda x: lean.adaptive_avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 2)),
    'global': (lambda x: lean.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, 1)),
}


@pytest.mark.parametrize('name', POOLS)
def test_pooling(name):
    function, stock = POOLS[name]
    x = draw(2, 3, 7, 9).requires_grad_()
    y = function(x)
    assert torch.autograd.gradcheck(function, x)
    assert torch.equal(y, stock(x))
    assert kept(function, x) == (y.numel() if name.startswith('max') else 0)
