import numpy as np
import pytest
import torch

from mmprotune import AdaptFormerPrompt
from tests.test_models.test_prompts.blocks import (
    CHANNELS,
    PIXELS,
    array,
    check_lean,
    check_start,
    convolved,
    drawn,
    feature,
)


def test_forward_by_hand():
    block = drawn(AdaptFormerPrompt(6, hidden=3, factor=0.7)).eval()
    x = feature(2, 6, 4, 5)
    hidden = np.maximum(convolved(array(x), block.reduce), 0)
    np.testing.assert_allclose(array(block(x)), 0.7 * convolved(hidden, block.expand), rtol=1e-9,
                               atol=1e-12)


def test_dropout():
    """Of the hidden map, at the rate that the config says, and only in training."""
    block = drawn(AdaptFormerPrompt(6, hidden=16, dropout=0.25))
    seen = []
    block.dropout.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    block(feature(2, 6, 40, 50))
    block.eval()(feature(2, 6, 40, 50))
    (before, after), (_, plain) = seen
    kept = after != 0
    assert kept.sum() / (before != 0).sum() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(after[kept], before[kept] / 0.75)
    assert torch.equal(plain, before)


def test_initialisation():
    block = AdaptFormerPrompt(256)
    assert (block.reduce.out_channels, block.dropout.p, block.factor) == (64, 0.1, 0.1)
    assert not block.expand.weight.any()
    assert not block.reduce.bias.any() and not block.expand.bias.any()
    # Kaiming-uniform with a = sqrt(5): within 1 / sqrt(fan in).
    assert 0.99 / 16 < block.reduce.weight.abs().max() <= 1 / 16
    block = drawn(AdaptFormerPrompt(256, zero_init=False))
    block.init_weights()
    assert 0.99 / 8 < block.expand.weight.abs().max() <= 1 / 8 and not block.expand.bias.any()


def test_start():
    check_start(AdaptFormerPrompt(8, hidden=4))


def test_lean():
    lean, ordinary = check_lean(dict(type='mmprotune.AdaptFormerPrompt', hidden=4))
    features = sum(c * n for c, n in zip(CHANNELS, (512, 128, 32, 8)))
    assert lean == 8 * (features + 4 * PIXELS) < ordinary


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(channels=8, hidden=-1), ValueError, r'prompt\.hidden must be at least 1, got -1'),
    (dict(channels=8, dropout=-0.1), ValueError, r'prompt\.dropout must be at least 0'),
    (dict(channels=8, factor=0), ValueError, r'prompt\.factor=0: the prompt would be zero'),
    (dict(channels=8, factor='0.1'), TypeError, r"prompt\.factor must be a number, got '0\.1'"),
    (dict(channels=True), TypeError, r'prompt\.channels must be an int, got True'),
])
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        AdaptFormerPrompt(**kwargs)
