"""Lean functions: gradients by gradcheck, results against PyTorch's, and what each keeps."""
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmprotune.lean import functional as lean
from mmprotune.lean.functional import activations
from mmprotune.lean.graph import Origin
from mmprotune.lean.memory import KeptBytes
from mmprotune.lean.onednn import pointwise, product, suits_pointwise, suits_product


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept(function, *inputs) -> int:
    """Bytes kept by a function, its inputs that exist anyway not excluded."""
    with KeptBytes(nn.Module()) as bytes_:
        output = function(*inputs)
    total = bytes_.total()
    del output
    return total


def settings(dims=2, stride=1, padding=0, dilation=1, groups=1, **kwargs) -> lean.Convolution:
    return lean.Convolution([stride] * dims, [padding] * dims, [dilation] * dims, groups, **kwargs)


CONVOLUTIONS = {
    'plain': (2, (3, 4, 3, 3), dict(padding=1)),
    'stride': (2, (3, 4, 3, 3), dict(stride=2, padding=1)),
    'dilated': (2, (3, 4, 3, 3), dict(dilation=2, padding=2)),
    'groups': (2, (4, 6, 3, 3), dict(groups=2, padding=1)),
    'depthwise': (2, (4, 4, 5, 5), dict(groups=4, padding=2)),
    'pointwise': (2, (3, 4, 1, 1), dict()),
    'pointwise with stride': (2, (3, 4, 1, 1), dict(stride=2)),
    'pointwise in groups': (2, (4, 6, 1, 1), dict(groups=2)),
    'no padding, odd rest': (2, (3, 4, 4, 4), dict(stride=3)),
    'reflect': (2, (3, 4, 3, 3), dict(pad=[1, 1, 1, 1], pad_mode='reflect')),
    'circular': (2, (3, 4, 3, 3), dict(pad=[1, 1, 1, 1], pad_mode='circular', stride=2)),
    'one-sided': (2, (3, 4, 2, 2), dict(pad=[0, 1, 0, 1])),
    '1d': (1, (3, 4, 3), dict(stride=2, padding=1)),
    '3d': (3, (2, 3, 2, 2, 2), dict(padding=1)),
}
TRANSPOSED = {
    'plain': (2, (3, 4, 3, 3), dict(stride=2, padding=1)),
    'output padding': (2, (3, 4, 3, 3), dict(stride=2, padding=1, output_padding=[1, 1])),
    'groups': (2, (4, 6, 3, 3), dict(stride=2, groups=2)),
    '1d': (1, (3, 4, 3), dict(stride=2)),
    '3d': (3, (2, 3, 2, 2, 2), dict(stride=2)),
}


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_convolution(name, norm, threads):
    dims, (cin, cout, *kernel), kwargs = CONVOLUTIONS[name]
    conv = settings(dims, **kwargs)
    weight, bias = draw(cout, cin // conv.groups, *kernel, seed=1), draw(cout, seed=2)
    affine = (draw(cout, seed=3), draw(cout, seed=4)) if norm else (None, None)
    x = draw(2, cin, *(7, 8, 6)[:dims]).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.autograd.gradcheck(
            lambda x: lean.convolution(x, weight, bias, conv, *affine), x, fast_mode=threads > 1)
        padded = x if conv.pad is None else F.pad(x, conv.pad, mode=conv.pad_mode)
        stock = (None, F.conv1d, F.conv2d, F.conv3d)[dims](
            padded, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if norm:
            shape = (1, cout, *[1] * dims)
            stock = stock * affine[0].view(shape) + affine[1].view(shape)
        torch.testing.assert_close(lean.convolution(x, weight, bias, conv, *affine), stock)
    finally:
        torch.set_num_threads(before)
    # The weight exists anyway; a norm's scale is one number a channel.
    assert kept(lambda x: lean.convolution(x, weight, bias, conv, *affine), x) == (
        weight.nbytes + (cout * 8 if norm else 0))


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('name', TRANSPOSED)
def test_transposed_convolution(name, norm):
    dims, (cin, cout, *kernel), kwargs = TRANSPOSED[name]
    conv = settings(dims, transposed=True, **kwargs)
    weight, bias = draw(cin, cout // conv.groups, *kernel, seed=1), draw(cout, seed=2)
    affine = (draw(cout, seed=3), draw(cout, seed=4)) if norm else (None, None)
    x = draw(2, cin, *(3, 4, 2)[:dims]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.convolution(x, weight, bias, conv, *affine), x)
    if not norm:
        stock = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims](
            x, weight, bias, conv.stride, conv.padding, conv.output_padding, conv.groups,
            conv.dilation)
        assert torch.equal(lean.convolution(x, weight, bias, conv), stock)


def test_convolution_without_a_batch():
    weight = draw(4, 3, 3, 3)
    x = draw(3, 6, 5).requires_grad_()
    y = lean.convolution(x, weight, None, settings(padding=1))
    assert torch.equal(y, F.conv2d(x, weight, padding=1)) and y.dim() == 3


def test_linear():
    weight, bias = draw(5, 3, seed=1), draw(5, seed=2)
    x = draw(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.linear(x, weight, bias), x)
    assert torch.equal(lean.linear(x, weight, bias), F.linear(x, weight, bias))
    assert kept(lambda x: lean.linear(x, weight, bias), x) == weight.nbytes


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


def test_bits_are_the_same_on_any_device():
    for n in (1, 7, 8, 9, 1000):
        mask = draw(n) > 0
        assert torch.equal(activations.pack_bits(mask), activations.pack_bits_anywhere(mask))


SMOOTH = {
    'gelu': (activations.GELU, F.gelu),
    'gelu tanh': (activations.GELU_TANH, lambda x: F.gelu(x, approximate='tanh')),
    'silu': (activations.SILU, F.silu),
    'hardswish': (activations.HARDSWISH, F.hardswish),
    'mish': (activations.MISH, F.mish),
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


@pytest.mark.parametrize('layer', ['linear', 'convolution', 'two layers'])
def test_an_activation_computes_the_layers_before_it_again(layer):
    """Only where that layer has an owner, and only what is smaller than its output."""
    weight, wide = draw(4, 3, 1, 1, seed=1), draw(4, 1, 3, 3, seed=2)
    matrix = draw(8, 3, seed=3)

    def function(x, owner):
        if layer == 'linear':
            return lean.activation(lean.linear(x, matrix, None, owner), activations.GELU)
        hidden = lean.convolution(x, weight, None, settings(), owner=owner)
        if layer == 'two layers':
            hidden = lean.convolution(hidden, wide, None, settings(padding=1, groups=4),
                                      owner=owner)
        return lean.activation(hidden, activations.GELU)

    x = draw(2, 6, 3) if layer == 'linear' else draw(2, 3, 5, 6)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, 'name'), x)
    assert torch.equal(function(x, 'name'), function(x, None))
    assert kept(lambda x: function(x, 'name'), x) == x.nbytes
    weights = dict(linear=matrix.nbytes, convolution=weight.nbytes).get(
        layer, weight.nbytes + wide.nbytes)
    assert kept(lambda x: function(x, None), x) > x.nbytes + weights - 1


def test_a_norm_and_what_follows_keep_one_tensor():
    norm_weight, matrix = draw(4, seed=1), draw(16, 4, seed=2)

    def function(x, owner='name'):
        y = lean.layer_norm(x, (4, ), norm_weight)
        return lean.activation(lean.linear(y, matrix, None, owner), activations.GELU)

    x = draw(2, 7, 4).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    statistics = 2 * 2 * 7 * 8
    assert kept(function, x) == x.nbytes + statistics + norm_weight.nbytes


def test_a_changed_tensor_has_no_origin():
    x = draw(2, 4).requires_grad_()
    y = lean.layer_norm(x, (4, ))
    assert Origin.of(y) is not None
    y.add_(1)
    assert Origin.of(y) is None


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
    from mmprotune.lean.functional import attention
    monkeypatch.setitem(attention.CHUNK_BYTES, 'cpu', chunk)
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

    assert torch.autograd.gradcheck(lambda x: function(x, 'name'), x)
    assert kept(lambda x: function(x, 'name'), x) == x.nbytes


def test_unfold_and_norm_keep_the_map():
    x = draw(2, 3, 6, 4).requires_grad_()

    def function(x):
        patches = lean.unfold(x, 3, padding=1, stride=1)
        return lean.layer_norm(patches.transpose(1, 2), (27, ))

    assert torch.autograd.gradcheck(function, x)
    assert kept(function, x) == x.nbytes + 2 * 2 * 24 * 8


FUNCTIONS = {
    'convolution': lambda x: lean.convolution(x, torch.ones(2, 3, 3, 3), None, settings()),
    'batch norm': lambda x: lean.batch_norm(x, torch.zeros(3), torch.ones(3)),
    'layer norm': lambda x: lean.layer_norm(x, x.shape[-1:]),
    'group norm': lambda x: lean.group_norm(x, 3),
    'relu': lean.relu,
    'activation': lambda x: lean.activation(x, activations.GELU),
    'max': lambda x: lean.max_pool2d(x, 2),
    'average': lambda x: lean.avg_pool2d(x, 2),
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


def test_a_parameter_that_trains_is_refused():
    x = draw(2, 3).requires_grad_()
    weight = draw(4, 3, seed=1).requires_grad_()
    with pytest.raises(lean.FrozenLayerError, match='requires_grad of one of them was set to True'):
        lean.linear(x, weight)
    with torch.no_grad():
        lean.linear(x, weight)


@pytest.mark.parametrize('name', ['convolution', 'activation', 'attention'])
def test_outputs_hold_nothing_once_the_graph_is_gone(name):
    """What a function notes on its output must not keep the input's memory alive for ever."""
    x = draw(2, 4, 8, dtype=torch.float32).requires_grad_()
    hidden = x * 2
    matrix = draw(24, 8, dtype=torch.float32)
    y = lean.linear(hidden, matrix, None, 'name')
    if name == 'activation':
        y = lean.activation(y, activations.GELU)
    elif name == 'attention':
        y = lean.packed_attention(y, 2, 1.)
    gone = weakref.ref(hidden)
    del hidden
    y.sum().backward()
    del y
    gc.collect()
    assert gone() is None


# --- kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('shape, kernel, stride, padding', [
    ((2, 3, 16, 16), 3, 2, 1), ((2, 3, 15, 9), 3, 2, 1), ((3, 15, 9), 3, 2, 1),
    ((1, 2, 3, 2), 13, 1, 6), ((1, 2, 8, 5), (2, 3), (2, 1), (0, 1)), ((1, 1, 7, 7), 7, 1, 3),
    ((1, 1, 9, 9), 2, 3, 0), ((1, 1, 5, 5), 5, 5, 2), ((1, 1, 2, 2), 2, 2, 0),
    ((1, 1, 4, 4), 2, 2, 1), ((1, 2, 1, 1), 3, 2, 1)])
def test_max_pooling_without_a_graph(shape, kernel, stride, padding, dtype):
    """Bitwise what PyTorch computes, whichever kernel is taken."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(-1)[::5] = x.min()
    inputs = [x]
    if x.dim() == 4:
        inputs.append(x.contiguous(memory_format=torch.channels_last))
    if x.numel() > 4:
        inputs.append(x.clone())
        inputs[-1].view(-1)[3] = float('nan')
        inputs.append(torch.full_like(x, -float('inf')))
    for x in inputs:
        found = lean.max_pool2d(x, kernel, stride, padding)
        expected = F.max_pool2d(x, kernel, stride, padding)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert found.is_contiguous() == expected.is_contiguous()


def test_max_pooling_refuses_what_pytorch_refuses():
    x = torch.randn(1, 1, 8, 8)
    for settings in ((3, 2, 2), (3, 0, 0), (9, 1, 0), (0, 1, 0)):
        with pytest.raises(RuntimeError) as ours:
            lean.max_pool2d(x, *settings)
        with pytest.raises(RuntimeError) as theirs:
            F.max_pool2d(x, *settings)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize('shape', [(2, 8, 5, 7), (1, 64, 1, 1), (3, 1, 4, 4)])
def test_pointwise(shape):
    x, matrix, bias = (draw(*s, dtype=torch.float32) for s in (shape, (5, shape[1]), (5, )))
    assert suits_pointwise(x, matrix[..., None, None]) == torch.backends.mkldnn.is_available()
    for b in (None, bias):
        expected = F.conv2d(x, matrix[..., None, None], b)
        torch.testing.assert_close(pointwise(x, matrix, b), expected)
        channels_last = x.contiguous(memory_format=torch.channels_last)
        y = pointwise(channels_last, matrix, b)
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous() == channels_last.is_contiguous()
    gradient = pointwise(expected, matrix.t())
    torch.testing.assert_close(gradient, F.conv_transpose2d(expected, matrix[..., None, None]))
    assert not suits_pointwise(x.double(), matrix.double()[..., None, None])
    assert not suits_pointwise(x[:0], matrix[..., None, None])
    for other in (torch.autocast('cpu', torch.bfloat16), FlopCounterMode(display=False)):
        with other:
            assert not suits_pointwise(x, matrix[..., None, None])


@pytest.mark.parametrize('shape', [(300, 64), (2, 150, 64), (3, 4, 25, 64)])
def test_product(shape):
    x, bias = draw(*shape, dtype=torch.float32), draw(96, dtype=torch.float32)
    matrix = draw(96, 64, dtype=torch.float32)
    assert suits_product(x, matrix) == torch.backends.mkldnn.is_available()
    strided = x.transpose(0, -2).contiguous().transpose(0, -2)
    turned = matrix.t().contiguous().t()
    for batch in (x, strided):
        for m in (matrix, turned):
            for b in (None, bias):
                y = product(batch, m, b)
                torch.testing.assert_close(y, F.linear(x, m, b))
                assert y.is_contiguous()
    assert not suits_product(x.double(), matrix.double())
    assert not suits_product(x[:0], matrix) and not suits_product(x[:1, ..., :1], matrix[:, :1])
    for other in (torch.autocast('cpu', torch.bfloat16), FlopCounterMode(display=False)):
        with other:
            assert not suits_product(x, matrix)


def test_linear_multiplies_by_onednn_only_where_it_may_round(monkeypatch):
    calls = []
    monkeypatch.setattr(lean, 'product', lambda *args: calls.append(args) or product(*args))
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
