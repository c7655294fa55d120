
import pytest
import torch
from torch.nn import functional as F

from mmprotune.lean import functional as lean
from mmprotune.lean.graph import FrozenLayerError
from tests.test_lean.functions import draw, kept


def test_linear():
    weight, bias = draw(5, 3, seed=1), draw(5, seed=2)
    x = draw(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.linear(x, weight, bias), x)
    assert torch.equal(lean.linear(x, weight, bias), F.linear(x, weight, bias))
    assert kept(lambda x: lean.linear(x, weight, bias), x) == weight.nbytes


def test_a_parameter_that_trains_is_refused():
    x = draw(2, 3).requires_grad_()
    weight = draw(4, 3, seed=1).requires_grad_()
    with pytest.raises(FrozenLayerError, match='requires_grad of one of them was set to True'):
        lean.linear(x, weight)
    with torch.no_grad():
        lean.linear(x, weight)
