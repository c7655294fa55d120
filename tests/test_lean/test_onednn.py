import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmprotune.lean import functional as lean
from mmprotune.lean import onednn
from tests.test_lean.functions import draw, settings

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='PyTorch was built without oneDNN')


@needs_onednn
@pytest.mark.parametrize('shape', [(300, 64), (2, 150, 64), (3, 4, 25, 64)])
def test_product(shape):
    x, bias = draw(*shape, dtype=torch.float32), draw(96, dtype=torch.float32)
    matrix = draw(96, 64, dtype=torch.float32)
    strided = x.transpose(0, -2).contiguous().transpose(0, -2)
    turned = matrix.t().contiguous().t()
    for batch in (x, strided):
        for m in (matrix, turned):
            for b in (None, bias):
                y = onednn.product(batch, m, b)
                torch.testing.assert_close(y, F.linear(x, m, b))
                assert y.is_contiguous()
    assert onednn.product(x.double(), matrix.double()) is None
    assert onednn.product(x[:0], matrix) is None
    assert onednn.product(x[:1, ..., :1], matrix[:, :1]) is None
    for other in (torch.autocast('cpu', torch.bfloat16), FlopCounterMode(display=False)):
        with other:
            assert onednn.product(x, matrix) is None


def test_linear_multiplies_by_onednn_only_where_it_may_round(monkeypatch):
    calls, product = [], onednn.product
    monkeypatch.setattr(onednn, 'product', lambda *args: calls.append(args) or product(*args))
    weight, bias = draw(96, 64, dtype=torch.float32), draw(96, dtype=torch.float32)
    found = []
    for fast in (False, True):
        x = draw(300, 64, dtype=torch.float32).requires_grad_()
        y = lean.linear(x, weight, bias, fast=fast)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
        assert len(calls) == (2 if fast else 0)
    assert torch.equal(found[0][0], F.linear(x, weight, bias))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize('missing', ['_linear', '_count_modes'])
@pytest.mark.parametrize('threads', [1, 2])
def test_without_its_operators_everything_is_pytorchs(missing, threads, monkeypatch):
    monkeypatch.setattr(onednn, missing, None)
    before = torch.get_num_threads()
    x, matrix = draw(2, 64, 20, 20, dtype=torch.float32), draw(96, 64, dtype=torch.float32)
    tokens, ones = draw(300, 64, dtype=torch.float32), torch.ones(96)
    assert onednn.product(tokens, matrix) is None
    torch.set_num_threads(threads)
    try:
        for image, ours, theirs in (
            (x, lambda x: lean.convolution(x, matrix[..., None, None], ones, settings()),
             lambda x: F.conv2d(x, matrix[..., None, None], ones)),
            (tokens, lambda x: lean.linear(x, matrix, ones, fast=True),
             lambda x: F.linear(x, matrix, ones))):
            a, b = (image.clone().requires_grad_() for _ in range(2))
            found, expected = ours(a), theirs(b)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            for y in (found, expected):
                y.square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-2)
    finally:
        torch.set_num_threads(before)
