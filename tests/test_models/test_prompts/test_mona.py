import numpy as np
import pytest
import torch

from mmprotune import MonaPrompt
from tests.test_models.test_prompts.blocks import (
    CHANNELS,
    PIXELS,
    array,
    check_lean,
    check_start,
    convolved,
    drawn,
    feature,
    gelu,
)


def test_forward_by_hand():
    block = drawn(MonaPrompt(6, hidden=3, zero_init=False)).eval()
    x = feature(2, 6, 9, 8)
    pixels = np.moveaxis(array(x), 1, -1)
    centred = pixels - pixels.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * array(block.norm.weight) + array(block.norm.bias)
    scaled = normed * array(block.norm_scale) + pixels * array(block.input_scale)
    hidden = convolved(np.moveaxis(scaled, -1, 1), block.reduce)
    assert [conv.kernel_size[0] for conv in block.spatial] == [3, 5, 7]
    hidden = hidden + sum(convolved(hidden, conv) for conv in block.spatial) / 3
    hidden = gelu(hidden + convolved(hidden, block.mix))
    np.testing.assert_allclose(array(block(x)), convolved(hidden, block.expand), rtol=1e-9,
                               atol=1e-12)


def test_dropout_lies_before_the_last_convolution():
    block = drawn(MonaPrompt(6, hidden=3, dropout=0.5, zero_init=False))
    seen = []
    block.expand.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    block(feature(1, 6, 9, 8))
    assert 0.2 < (seen[0] == 0).double().mean() < 0.8


def test_initialisation():
    """Of the authors where asked for; else their last convolution alone is another."""
    block = MonaPrompt(256, zero_init=False)
    assert block.reduce.out_channels == 64 and block.dropout.p == 0.1
    assert torch.equal(block.norm_scale, torch.full((256, ), 1e-6))
    assert torch.equal(block.input_scale, torch.ones(256))
    for conv in (block.reduce, block.expand):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(conv.weight.mean()) < 1e-3 and not conv.bias.any()
    assert block.expand.weight.abs().max() > 0.05  # normal, not uniform
    block = MonaPrompt(256)
    assert not block.expand.weight.any() and block.reduce.weight.std() > 0.018
    drawn(block).init_weights()
    assert not block.expand.weight.any() and (block.norm_scale == 1e-6).all()
    assert (block.norm.weight == 1).all() and not block.norm.bias.any()


def test_start():
    check_start(MonaPrompt(8, hidden=4))


def test_lean():
    lean, ordinary = check_lean(dict(type='mmprotune.MonaPrompt', hidden=4))
    features = sum(c * n for c, n in zip(CHANNELS, (512, 128, 32, 8)))
    assert lean == 8 * (features + 4 * PIXELS) < ordinary


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(channels=0), ValueError, r'prompt\.channels must be at least 1, got 0'),
    (dict(channels=8, hidden=0), ValueError, r'prompt\.hidden must be at least 1, got 0'),
    (dict(channels=8, hidden=2.), TypeError, r'prompt\.hidden must be an int, got 2\.0'),
    (dict(channels=8, dropout=1), ValueError, r'prompt\.dropout must be .* less than 1, got 1'),
    (dict(channels=8, dropout='0.1'), TypeError, r"prompt\.dropout must be a number, got '0\.1'"),
])
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        MonaPrompt(**kwargs)


def test_wrong_input_shape():
    with pytest.raises(ValueError, match=r'MonaPrompt expects \(N, 8, H, W\), got \(1, 4, 3, 3\)'):
        MonaPrompt(8)(torch.zeros(1, 4, 3, 3))
