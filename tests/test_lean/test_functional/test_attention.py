
import pytest
import torch

from mmprotune.lean import functional as lean
from mmprotune.lean.functional.attention import CHUNK_BYTES
from mmprotune.lean.graph import LeanState
from tests.test_lean.functions import draw, kept


def reference_attention(qkv, heads, scale, biases):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv)
    scores = q * scale @ k.transpose(-1, -2)
    for bias in biases:
        scores = scores + (bias if bias.size(0) == 1 else bias.repeat(
            scores.size(0) // bias.size(0), 1, 1, 1))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize('chunk', [1, 4 << 20])
@pytest.mark.parametrize('bias', ['none', 'heads', 'windows'])
def test_attention(bias, chunk, monkeypatch):
    """All at once, and one matrix at a time."""
    monkeypatch.setitem(CHUNK_BYTES, 'cpu', chunk)
    heads, biases = 2, []
    if bias != 'none':
        biases.append(draw(1, heads, 5, 5, seed=1))
    if bias == 'windows':
        biases.append(draw(2, 1, 5, 5, seed=2))
    qkv = draw(4, 5, 18).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.packed_attention(x, heads, 0.5, biases), qkv)
    expected = reference_attention(qkv.chunk(3, -1), heads, 0.5, biases)
    torch.testing.assert_close(lean.packed_attention(qkv, heads, 0.5, biases), expected)
    assert kept(lambda x: lean.packed_attention(x, heads, 0.5, biases), qkv) == (
        qkv.nbytes + sum(b.nbytes for b in biases))

    parts = [t.detach().contiguous().requires_grad_() for t in qkv.chunk(3, -1)]
    assert torch.autograd.gradcheck(lambda *p: lean.attention(*p, heads, 0.5, biases), parts)
    longer = [draw(4, 5, 6).requires_grad_(), draw(4, 3, 6).requires_grad_(),
              draw(4, 3, 6).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *p: lean.attention(*p, heads, 0.5), longer)


def test_attention_after_an_owned_linear_layer():
    matrix = draw(18, 6, seed=1)
    x = draw(2, 5, 6).requires_grad_()

    def function(x, owner):
        return lean.packed_attention(lean.linear(x, matrix, None, owner), 2, 0.5)

    assert torch.autograd.gradcheck(lambda x: function(x, LeanState()), x)
    assert kept(lambda x: function(x, LeanState()), x) == x.nbytes
