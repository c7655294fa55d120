import numpy as np
import pytest
import torch
from torch import nn

from mmprotune import ConvAdapterPrompt
from tests.test_models.test_prompts.blocks import (
    CHANNELS,
    array,
    check_lean,
    check_start,
    convolved,
    drawn,
    feature,
)


@pytest.mark.parametrize('kernel_size', [3, 5])
def test_forward_by_hand(kernel_size):
    """Each hidden channel reads its own three of the feature."""
    block = drawn(ConvAdapterPrompt(12, reduction=3, kernel_size=kernel_size, zero_init=False))
    assert block.reduce.weight.shape == (4, 3, kernel_size, kernel_size)
    x = feature(2, 12, 6, 5)
    hidden = np.maximum(convolved(array(x), block.reduce), 0)
    expected = convolved(hidden, block.expand) * array(block.scale)[:, None, None]
    np.testing.assert_allclose(array(block(x)), expected, rtol=1e-9, atol=1e-12)
    x[:, 3:] = 0
    moved = block.down(x) - block.down(torch.zeros_like(x))
    assert moved[:, 0].any() and not moved[:, 1:].any()


def test_initialisation():
    """PyTorch's, and the authors' scale of 1."""
    torch.manual_seed(3)
    block = ConvAdapterPrompt(64, zero_init=False)
    torch.manual_seed(3)
    alike = [m for _ in range(2) for m in (nn.Conv2d(64, 8, 3, groups=8), nn.Conv2d(8, 64, 1))]
    for conv, other in zip((block.reduce, block.expand), alike[2:]):
        assert torch.equal(conv.weight, other.weight) and torch.equal(conv.bias, other.bias)
    assert torch.equal(block.scale, torch.ones(64)) and isinstance(block.act, nn.ReLU)
    assert (ConvAdapterPrompt(8, scale=0.5).scale == 0.5).all()
    block = drawn(ConvAdapterPrompt(64))
    block.init_weights()
    assert not block.expand.weight.any() and not block.expand.bias.any()
    assert (block.scale == 1).all()


def test_start():
    check_start(ConvAdapterPrompt(8, reduction=2))


def test_lean():
    lean, ordinary = check_lean(dict(type='mmprotune.ConvAdapterPrompt'))
    features = sum(c * n for c, n in zip(CHANNELS, (512, 128, 32, 8)))
    assert lean == 8 * (features + features // 8) < ordinary


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(channels=100), ValueError,
     r'prompt\.reduction=8 leaves 12 hidden channels, which have to divide channels=100'),
    (dict(channels=4), ValueError, r'reduction=8 leaves no hidden channels.*channels=4'),
    (dict(channels=8, kernel_size=4), ValueError, r'prompt\.kernel_size must be odd, got 4'),
    (dict(channels=8, scale=0), ValueError, 'neither would ever get a gradient'),
    (dict(channels=8, scale='1'), TypeError, r"prompt\.scale must be a number, got '1'"),
    (dict(channels=8, act_cfg='ReLU'), TypeError, r'prompt\.act_cfg must be a dict'),
    (dict(channels='8'), TypeError, r"prompt\.channels must be an int, got '8'"),
])
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        ConvAdapterPrompt(**kwargs)


def test_the_prompt_has_the_precision_of_autocast():
    block = drawn(ConvAdapterPrompt(8)).float()
    with torch.autocast('cpu', torch.bfloat16):
        assert block(feature(1, 8, 3, 3).float()).dtype == torch.bfloat16
