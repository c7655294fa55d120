
import pytest
import torch
from torch.nn import functional as F

from mmprotune.lean import functional as lean
from mmprotune.lean.functional import activations
from mmprotune.lean.graph import LeanState
from tests.test_lean.functions import draw, kept, settings

CLAMPS = {
    'relu': (lean.relu, F.relu),
    'relu6': (lambda x: lean.hardtanh(x, 0., 6.), F.relu6),
    'hardtanh': (lean.hardtanh, F.hardtanh),
    'hardsigmoid': (lean.hardsigmoid, F.hardsigmoid),
    'leaky relu': (lambda x: lean.leaky_relu(x, 0.1), lambda x: F.leaky_relu(x, 0.1)),
}


@pytest.mark.parametrize('shape', [(2, 3, 5, 7), (1, ), (17, ), (2, 8)])
@pytest.mark.parametrize('name', CLAMPS)
def test_clamps(name, shape):
    function, stock = CLAMPS[name]
    x = (draw(*shape) * 4).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.equal(function(x), stock(x))
    assert kept(function, x) == -(-x.numel() // 8)


@pytest.mark.parametrize('name', CLAMPS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_clamps_at_the_kink_and_beyond(name, dtype):
    """The same gradient as PyTorch's at 0, 6, infinity, and for gradients that are not finite."""
    function, stock = CLAMPS[name]
    inf = float('inf')
    values = torch.tensor([0., -0., 6., 1., -1., inf, -inf, 5.9, 0.1], dtype=dtype)
    for grad in (torch.arange(1., 10.).to(dtype), torch.full((9, ), inf, dtype=dtype)):
        found, expected = (torch.autograd.grad(f(x), x, grad)[0] for f, x in (
            (function, values.clone().requires_grad_()), (stock, values.clone().requires_grad_())))
        if name == 'leaky relu' and not grad.isfinite().all():
            found, expected = found.isfinite(), expected.isfinite()
            expected = expected & found  # inf - inf in the small slope is no number
        tolerance = 1e-3 if name == 'leaky relu' else 0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'strided', 'expanded'])
def test_clamps_in_any_layout(layout):
    x = draw(2, 4, 6, 5)
    x = dict(channels_last=x.to(memory_format=torch.channels_last), transposed=x.transpose(1, 3),
             strided=x[:, ::2, 1:], expanded=x[:, :1].expand(2, 4, 6, 5))[layout]
    x = x.detach().requires_grad_()
    grad = draw(*x.shape, seed=5)
    assert torch.equal(*(torch.autograd.grad(f(x), x, grad)[0] for f in (lean.relu, F.relu)))
    if layout == 'channels_last':
        assert lean.relu(x).is_contiguous(memory_format=torch.channels_last)


def test_inplace_relu():
    x = draw(2, 3, 4).requires_grad_()
    hidden = x * 2
    y = lean.relu(hidden, inplace=True)
    assert y.data_ptr() == hidden.data_ptr()
    y.sum().backward()
    assert torch.equal(x.grad, 2. * (x > 0))


SMOOTH = {
    'gelu': (activations.GELU, F.gelu),
    'gelu tanh': (activations.GELU_TANH, lambda x: F.gelu(x, approximate='tanh')),
    'silu': (activations.SILU, F.silu),
    'hardswish': (activations.HARDSWISH, F.hardswish),
    'mish': (activations.MISH, F.mish),
    'quick gelu': (activations.QUICK_GELU, lambda x: x * torch.sigmoid(1.702 * x)),
    'swish': (activations.SWISH, lambda x: x * torch.sigmoid(x)),
}


@pytest.mark.parametrize('name', SMOOTH)
def test_smooth_activations(name):
    act, stock = SMOOTH[name]
    x = draw(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.activation(x, act), x)
    assert torch.equal(lean.activation(x, act), stock(x))
    assert kept(lambda x: lean.activation(x * 1, act), x) <= x.nbytes


@pytest.mark.parametrize('function, stock', [(lean.sigmoid, torch.sigmoid),
                                             (lean.tanh, torch.tanh)])
def test_activations_that_keep_their_output(function, stock):
    x = draw(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    y = function(x)
    assert torch.equal(y, stock(x))
    assert kept(function, x) == x.nbytes
    # The product keeps what it keeps anyway.
    assert kept(lambda x: function(x) * x, x) == 2 * x.nbytes


@pytest.mark.parametrize('layer', ['linear', 'convolution', 'two layers', 'norms'])
def test_an_activation_computes_the_layers_before_it_again(layer):
    """Only where that layer has an owner, and only what is smaller than its output."""
    weight, wide = draw(4, 3, 1, 1, seed=1), draw(4, 1, 3, 3, seed=2)
    matrix = draw(8, 3, seed=3)
    statistics = draw(4, seed=4), draw(4, seed=5).abs() + 0.1, draw(4, seed=6), draw(4, seed=7)

    def function(x, owner):
        if layer == 'linear':
            return lean.activation(lean.linear(x, matrix, None, owner), activations.GELU)
        hidden = lean.convolution(x, weight, None, settings(), owner=owner)
        if layer == 'norms':
            hidden = lean.batch_norm(hidden, *statistics)
        if layer in ('two layers', 'norms'):
            hidden = lean.convolution(hidden, wide, None, settings(padding=1, groups=4),
                                      owner=owner)
        if layer == 'norms':
            hidden = lean.batch_norm(hidden, *statistics)
        return lean.activation(hidden, activations.GELU)

    x = draw(2, 6, 3) if layer == 'linear' else draw(2, 3, 5, 6)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, LeanState()), x)
    assert torch.equal(function(x, LeanState()), function(x, None))
    assert kept(lambda x: function(x, LeanState()), x) == x.nbytes
    weights = dict(linear=matrix.nbytes, convolution=weight.nbytes).get(
        layer, weight.nbytes + wide.nbytes)
    assert kept(lambda x: function(x, None), x) > x.nbytes + weights - 1
