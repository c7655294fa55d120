import numpy as np
import pytest
import torch
from torch import nn

from mmprotune import LinearAdapterPrompt
from tests.test_models.test_prompts.blocks import (
    CHANNELS,
    array,
    check_lean,
    check_start,
    convolved,
    drawn,
    feature,
    gelu,
)


@pytest.mark.parametrize('act', [True, False])
def test_forward_by_hand(act):
    block = drawn(LinearAdapterPrompt(8, **({} if act else dict(act_cfg=None))))
    x = feature(2, 8, 4, 5)
    hidden = convolved(array(x), block.reduce)
    assert hidden.shape[1] == 2
    expected = convolved(gelu(hidden) if act else hidden, block.expand)
    np.testing.assert_allclose(array(block(x)), expected, rtol=1e-9, atol=1e-12)


def test_initialisation():
    """PyTorch's where asked for."""
    torch.manual_seed(3)
    block = LinearAdapterPrompt(64, zero_init=False)
    torch.manual_seed(3)
    alike = [m for _ in range(2) for m in (nn.Linear(64, 16), nn.Linear(16, 64))]
    for conv, other in zip((block.reduce, block.expand), alike[2:]):
        assert torch.equal(conv.weight.flatten(1), other.weight)
        assert torch.equal(conv.bias, other.bias)
    block = drawn(LinearAdapterPrompt(64))
    block.init_weights()
    assert not block.expand.weight.any() and not block.expand.bias.any()


def test_start():
    check_start(LinearAdapterPrompt(8))


def test_lean():
    lean, ordinary = check_lean(dict(type='mmprotune.LinearAdapterPrompt'))
    features = sum(c * n for c, n in zip(CHANNELS, (512, 128, 32, 8)))
    assert lean == 8 * (features + features // 4) < ordinary


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(channels=8, reduction=9), ValueError, r'reduction=9 leaves no hidden channels.*=8'),
    (dict(channels=8, reduction=None), TypeError, r'prompt\.reduction must be a number, got None'),
    (dict(channels=8, act_cfg=dict(type='No')), ValueError, r"prompt\.act_cfg\.type='No'"),
])
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        LinearAdapterPrompt(**kwargs)
