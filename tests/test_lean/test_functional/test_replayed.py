
import pytest
import torch

from mmprotune.lean import functional as lean
from mmprotune.lean.functional.attention import CHUNK_BYTES
from mmprotune.lean.graph import LeanState
from tests.test_lean.functions import draw, kept


def product(a, b, factor):
    return (a.sin() * b * factor).sum(-1, keepdim=True) * a


def test_what_a_host_computes():
    a, b, factor = draw(2, 5, 6).requires_grad_(), draw(2, 5, 6, seed=1).requires_grad_(), draw(6)

    def function(a, b):
        return lean.replayed(product, a, b, extras=[factor])

    assert torch.autograd.gradcheck(function, (a, b))
    assert torch.equal(function(a, b), product(a, b, factor))
    assert kept(function, a, b) == a.nbytes + b.nbytes + factor.nbytes


def test_after_an_owned_linear_layer():
    matrix, other = draw(18, 6, seed=1), draw(18, 6, seed=2)
    x = draw(2, 5, 6).requires_grad_()

    def function(x, owner):
        y = lean.layer_norm(x, (6, ))
        return lean.replayed(torch.mul, *(lean.linear(y, m, None, owner) for m in (matrix, other)))

    assert torch.autograd.gradcheck(lambda x: function(x, LeanState()), x)
    statistics = 2 * 2 * 5 * x.element_size()
    assert kept(lambda x: function(x, LeanState()), x) == x.nbytes + statistics
    assert kept(lambda x: function(x, None), x) == (
        7 * x.nbytes + statistics + matrix.nbytes + other.nbytes)


@pytest.mark.parametrize('chunk', [1, 4 << 20])
def test_in_parts(chunk, monkeypatch):
    """One matrix of probabilities at a time, and all at once."""
    monkeypatch.setitem(CHUNK_BYTES, 'cpu', chunk)
    qkv, seen = draw(2, 5, 18).requires_grad_(), []

    def compute(qkv):
        q, k, v = qkv.unflatten(-1, (3, 3, 2)).permute(2, 0, 3, 1, 4).unbind(0)
        return q * 0.5, k, v

    def mix(q, k, v):
        seen.append(q.shape[:2])
        return (q @ k.mT).softmax(-1) @ v

    y = lean.replayed(compute, qkv, mix=mix)
    assert set(seen) == {(1, 1) if chunk == 1 else (2, 3)}
    torch.testing.assert_close(y, mix(*compute(qkv)))
    assert torch.autograd.gradcheck(lambda x: lean.replayed(compute, x, mix=mix), qkv)
    assert kept(lambda x: lean.replayed(compute, x, mix=mix), qkv) == qkv.nbytes
