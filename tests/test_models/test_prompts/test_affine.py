import numpy as np
import pytest
import torch

from mmprotune import AffinePrompt
from tests.conftest import RESNET18, build
from tests.test_models.test_prompts.blocks import (
    CHANNELS,
    array,
    check_lean,
    drawn,
    feature,
)


def test_forward_by_hand():
    block = drawn(AffinePrompt(3))
    x = feature(2, 3, 4, 5)
    expected = np.empty(x.shape)
    for c, (gamma, beta) in enumerate(zip(block.gamma.tolist(), block.beta.tolist())):
        expected[:, c] = gamma * array(x)[:, c] + beta
    np.testing.assert_allclose(array(x + block(x)), expected, rtol=1e-12)


def test_start_and_gradients():
    block = AffinePrompt(3)
    x = feature(2, 3, 4, 5).float()
    prompt = block(x)
    assert torch.equal(x + prompt, x)
    prompt.sum().backward()
    torch.testing.assert_close(block.gamma.grad, x.sum(dim=(0, 2, 3)))
    torch.testing.assert_close(block.beta.grad, torch.full((3, ), 40.))


def test_initialisation():
    block = AffinePrompt(10000, zero_init=False)
    for p, mean in ((block.gamma, 1), (block.beta, 0)):
        assert p.mean().item() == pytest.approx(mean, abs=1e-3)
        assert p.std().item() == pytest.approx(0.02, rel=0.05)
    block = drawn(AffinePrompt(4))
    block.init_weights()
    assert (block.gamma == 1).all() and (block.beta == 0).all()


def test_it_keeps_its_feature_only():
    lean, ordinary = check_lean(dict(type='mmprotune.AffinePrompt'))
    features = sum(c * n for c, n in zip(CHANNELS, (512, 128, 32, 8)))
    # And a number a channel, but for the first stage, whose feature needs no gradient.
    assert lean == ordinary == 8 * (features + sum(CHANNELS[1:]))


def test_the_prompt_has_the_precision_of_the_feature():
    x = feature(1, 3, 2, 2).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        assert AffinePrompt(3)(x).dtype == torch.bfloat16


def test_it_does_not_stand_alone():
    cfg = dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
               prompt=dict(type='mmprotune.AffinePrompt'), last_stage='serial')
    with pytest.raises(ValueError, match="last_stage='serial' .* AffinePrompt is only a change"):
        build(cfg)


@pytest.mark.parametrize('channels, error, match', [
    (0, ValueError, r'prompt\.channels must be at least 1, got 0'),
    (None, TypeError, r'prompt\.channels must be an int, got None')])
def test_bad_arguments(channels, error, match):
    with pytest.raises(error, match=match):
        AffinePrompt(channels)


def test_wrong_input_shape():
    with pytest.raises(ValueError, match=r'AffinePrompt expects \(N, 8, H, W\), got \(8, 3, 3\)'):
        AffinePrompt(8)(torch.zeros(8, 3, 3))
