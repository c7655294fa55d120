"""Gradients by gradcheck, results against PyTorch's, and what is kept; so in the files beside."""

import pytest
import torch
from torch.nn import functional as F

from mmprotune.lean import functional as lean
from tests.test_lean.functions import draw, kept, settings

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
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_convolution(name, threads):
    dims, (cin, cout, *kernel), kwargs = CONVOLUTIONS[name]
    conv = settings(dims, **kwargs)
    weight, bias = draw(cout, cin // conv.groups, *kernel, seed=1), draw(cout, seed=2)
    x = draw(2, cin, *(7, 8, 6)[:dims]).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.autograd.gradcheck(
            lambda x: lean.convolution(x, weight, bias, conv), x, fast_mode=threads > 1)
        padded = x if conv.pad is None else F.pad(x, conv.pad, mode=conv.pad_mode)
        stock = (None, F.conv1d, F.conv2d, F.conv3d)[dims](
            padded, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        assert torch.equal(lean.convolution(x, weight, bias, conv), stock)
    finally:
        torch.set_num_threads(before)
    # The weight exists anyway.
    assert kept(lambda x: lean.convolution(x, weight, bias, conv), x) == weight.nbytes


@pytest.mark.parametrize('name', TRANSPOSED)
def test_transposed_convolution(name):
    dims, (cin, cout, *kernel), kwargs = TRANSPOSED[name]
    conv = settings(dims, transposed=True, **kwargs)
    weight, bias = draw(cin, cout // conv.groups, *kernel, seed=1), draw(cout, seed=2)
    x = draw(2, cin, *(3, 4, 2)[:dims]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lean.convolution(x, weight, bias, conv), x)
    stock = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims](
        x, weight, bias, conv.stride, conv.padding, conv.output_padding, conv.groups,
        conv.dilation)
    assert torch.equal(lean.convolution(x, weight, bias, conv), stock)


def test_convolution_without_a_batch():
    weight = draw(4, 3, 3, 3)
    x = draw(3, 6, 5).requires_grad_()
    y = lean.convolution(x, weight, None, settings(padding=1))
    assert torch.equal(y, F.conv2d(x, weight, padding=1)) and y.dim() == 3
