import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmprotune import PromptBlock
from tests.conftest import wake


def test_zero_init_gives_a_zero_prompt_that_learns():
    block = PromptBlock(16)
    x = torch.randn(2, 16, 7, 9)
    prompt = block(x)
    assert prompt.shape == x.shape
    assert torch.equal(prompt, torch.zeros_like(x))
    prompt.sum().backward()
    assert block.expand.weight.grad.abs().sum() > 0


def test_forward_by_hand():
    """The formula of the docstring, written out with functional operators."""
    block = PromptBlock(8, reduction=2, kernel_size=3, scale=0.5, zero_init=False)
    x = torch.randn(2, 8, 5, 6)
    hidden = torch.einsum('oc,nchw->nohw', block.reduce.weight[:, :, 0, 0], x)
    padded = F.pad(hidden, (1, 1, 1, 1))
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # (N, 4, 5, 6, 3, 3)
    hidden = torch.einsum('nchwij,cij->nchw', windows, block.spatial.weight[:, 0])
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = 0.5 * torch.einsum('oc,nchw->nohw', block.expand.weight[:, :, 0, 0], hidden)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize('reduction, hidden', [(4, 16), (1, 64), (64, 1), (2.5, 25)])
def test_widths(reduction, hidden):
    block = PromptBlock(64, reduction=reduction)
    assert block.reduce.out_channels == hidden
    assert block.spatial.weight.shape == (hidden, 1, 5, 5)  # depthwise by default


def test_parameters_of_the_default_on_resnet50():
    """About 2.8M, by the design's own count: 2 C h + h k^2 + biases."""
    blocks = [PromptBlock(c) for c in (256, 512, 1024, 2048)]
    expected = sum(2 * c * c // 4 + c // 4 * 27 + c for c in (256, 512, 1024, 2048))
    assert sum(p.numel() for b in blocks for p in b.parameters()) == expected
    assert 2.7e6 < expected < 2.9e6


def test_groups_norm_and_activation():
    block = PromptBlock(16, groups=2, norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU'))
    assert block.spatial.groups == 2
    assert isinstance(block.norm, nn.BatchNorm2d) and block.norm.num_features == 4
    assert isinstance(block.act, nn.ReLU)
    block = PromptBlock(16, norm_cfg=dict(type='GN', num_groups=2), act_cfg=None)
    assert block.norm.num_channels == 4
    assert isinstance(block.act, nn.Identity)
    assert block(torch.randn(1, 16, 4, 4)).shape == (1, 16, 4, 4)


def test_scale_gets_a_gradient_when_the_convolution_does_not_start_at_zero():
    block = PromptBlock(8, scale=0., zero_init=False)
    prompt = block(torch.randn(1, 8, 4, 4))
    assert torch.equal(prompt, torch.zeros_like(prompt))
    prompt.sum().backward()
    assert block.scale.grad.abs() > 0


def test_init_weights_draws_anew():
    block = PromptBlock(8)
    wake(block)
    before = block.reduce.weight.clone()
    block.init_weights()
    assert not torch.equal(block.reduce.weight, before)
    assert torch.equal(block.expand.weight, torch.zeros_like(block.expand.weight))


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(channels=0), ValueError, r'prompt\.channels must be at least 1, got 0'),
    (dict(channels=2.0), TypeError, r'prompt\.channels must be an int, got 2\.0'),
    (dict(channels=8, reduction=16), ValueError, r'reduction=16 leaves no hidden channels.*=8'),
    (dict(channels=8, reduction=0), ValueError, 'reduction=0 leaves no hidden channels'),
    (dict(channels=8, reduction='4'), TypeError, 'reduction must be a number'),
    (dict(channels=8, kernel_size=4), ValueError, 'kernel_size must be odd, got 4'),
    (dict(channels=16, groups=3), ValueError, r'groups must divide the 4 hidden channels.*got 3'),
    (dict(channels=8, scale=0), ValueError, 'neither would ever get a gradient'),
    (dict(channels=8, norm_cfg=dict(type='NoSuch')), ValueError, "norm_cfg.type='NoSuch'"),
    (dict(channels=8, norm_cfg='BN'), TypeError, 'norm_cfg must be a dict'),
    (dict(channels=8, norm_cfg=dict(type='LayerNorm')), ValueError, "'LayerNorm' is for"),
    (dict(channels=8, act_cfg=dict(type='NoSuch')), ValueError, "act_cfg.type='NoSuch'"),
    (dict(channels=8, norm_cfg=dict(type='BN', requires_grad=False)), ValueError, 'always train'),
])
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        PromptBlock(**kwargs)


def test_wrong_input_shape():
    with pytest.raises(ValueError, match=r'expects \(N, 8, H, W\), got \(1, 4, 3, 3\)'):
        PromptBlock(8)(torch.zeros(1, 4, 3, 3))
