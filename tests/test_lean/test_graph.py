import gc
import io
import weakref

import pytest
import torch

from mmprotune.lean import functional as lean
from mmprotune.lean.functional import activations
from mmprotune.lean.graph import LeanState, Origin, Producer
from tests.test_lean.functions import draw


def test_a_changed_tensor_has_no_origin():
    x = draw(2, 4).requires_grad_()
    y = lean.layer_norm(x, (4, ))
    assert Origin.of(y) is not None
    y.add_(1)
    assert Origin.of(y) is None


@pytest.mark.parametrize('name', ['convolution', 'activation', 'attention', 'replayed'])
def test_outputs_hold_nothing_once_the_graph_is_gone(name):
    """What a function notes on its output must not keep the input's memory alive for ever."""
    x = draw(2, 4, 8, dtype=torch.float32).requires_grad_()
    hidden = x * 2
    matrix = draw(24, 8, dtype=torch.float32)
    y = lean.linear(hidden, matrix, None, LeanState())
    if name == 'activation':
        y = lean.activation(y, activations.GELU)
    elif name == 'attention':
        y = lean.packed_attention(y, 2, 1.)
    elif name == 'replayed':
        y = lean.replayed(torch.sin, y)
    gone = weakref.ref(hidden)
    del hidden
    y.sum().backward()
    del y
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize('layer', ['layer norm', 'linear'])
def test_outputs_are_saved_like_any_tensor(layer):
    """In a graph, what is noted on them stays behind."""
    x = draw(2, 4).requires_grad_()
    y = lean.linear(x, draw(3, 4), None, LeanState()) if layer == 'linear' else lean.layer_norm(
        x, (4, ))
    file = io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded, y)
    assert Origin.of(loaded) is None and Producer.of(loaded) is None


def test_a_detached_tensor_has_no_producer():
    x = draw(2, 4).requires_grad_()
    y = lean.linear(x, draw(3, 4), None, LeanState())
    assert Producer.of(y) is not None
    y.detach_().requires_grad_()
    lean.activation(y, activations.GELU).sum().backward()
    assert y.grad is not None and x.grad is None
