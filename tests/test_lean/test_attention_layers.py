import copy

import pytest
import torch

from mmprotune.lean import make_lean
from mmprotune.lean.memory import KeptBytes
from tests.test_lean.networks import SMALL, distance, images, kept_by, outputs_of, prompted


def test_attention_may_use_the_fused_kernel_or_stay_as_it_is():
    x = images(1, 3, 96, 64)
    exact, fused, stock = (prompted(SMALL['vit'], lean=dict(attention=a))
                           for a in ('exact', 'sdpa', False))
    assert distance(outputs_of(fused, x), outputs_of(exact, x)) < 1e-5
    assert distance(outputs_of(stock, x), outputs_of(exact, x)) == 0
    assert sum(kept_by(stock, x).values()) > sum(kept_by(exact, x).values())


BEIT = dict(num_heads=3, window_size=(4, 6))


@pytest.mark.parametrize('options', [
    dict(use_rel_pos_bias=True), dict(use_rel_pos_bias=False),
    dict(use_rel_pos_bias=True, bias=True), dict(use_rel_pos_bias=True, bias=False),
    dict(use_rel_pos_bias=True, shared=True)], ids=str)
@pytest.mark.parametrize('library', ['mmseg', 'mmpretrain'])
def test_relative_positions_of_beit(library, options):
    """Bitwise the host's outputs; nothing of the size of the probabilities is kept."""
    if library == 'mmseg':
        if 'shared' in options or not options['use_rel_pos_bias']:
            pytest.skip('mmseg has neither')
        from mmseg.models.backbones.beit import BEiTAttention
    else:
        from mmpretrain.models.utils.attention import BEiTAttention
    options = dict(options)
    shared = torch.randn(3, 25, 25) if options.pop('shared', False) else None
    torch.manual_seed(0)
    layer = BEiTAttention(12, **BEIT, **options)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3).requires_grad_(False)
    stock = copy.deepcopy(layer)
    report = make_lean(layer, dict(rounds=False))
    assert report.covered[''] == 'BEiTAttention'
    args = () if shared is None else (shared, )
    x = torch.randn(2, 25, 12)
    found, kept = [], []
    for net in (layer, stock):
        image = x.clone().requires_grad_()
        with KeptBytes(net) as count:
            y = net(image, *args)
            kept.append(count.total())
        y.sin().sum().backward()
        found += [y.detach(), image.grad]
    y, gradient, exact, exact_gradient = found
    assert torch.equal(y, exact)
    torch.testing.assert_close(gradient, exact_gradient, rtol=1e-4, atol=1e-5)
    probabilities = 2 * 3 * 25 * 25 * 4
    assert kept[0] <= kept[1] - probabilities + (0 if shared is None else shared.nbytes)
    layer.q_bias.requires_grad_() if hasattr(layer, 'q_bias') else layer.qkv.weight.requires_grad_()
    layer(x, *args).sum().backward()  # it trains now: the host's own way
    assert (layer.q_bias if hasattr(layer, 'q_bias') else layer.qkv.weight).grad.any()


@pytest.mark.parametrize('qkv_bias', [True, False])
@pytest.mark.parametrize('masked', [True, False])
def test_cosines_of_swin_v2(qkv_bias, masked):
    """As the host's, in double precision; nothing of the size of the probabilities is kept."""
    from mmpretrain.models.utils.attention import WindowMSAV2
    torch.manual_seed(0)
    layer = WindowMSAV2(12, (4, 6), 3, qkv_bias=qkv_bias).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.5).requires_grad_(False)
    stock = copy.deepcopy(layer)
    assert make_lean(layer, dict(rounds=False)).covered[''] == 'WindowMSAV2'
    mask = torch.where(torch.rand(2, 24, 24) < 0.3, -100., 0.).double() if masked else None
    x = torch.randn(4, 24, 12, dtype=torch.double)
    x[0, 0] = 0  # without a bias: a vector of length zero
    found, kept = [], []
    for net in (layer, stock):
        image = x.clone().requires_grad_()
        with KeptBytes(net) as count:
            y = net(image, mask)
            kept.append(count.total())
        y.sin().sum().backward()
        found.append((y.detach(), image.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert kept[0] < kept[1] - 4 * 3 * 24 * 24 * 8
    layer.logit_scale.requires_grad_()
    layer(x, mask).sum().backward()
    assert layer.logit_scale.grad.any()


def test_rotary_tables_stay_those_of_their_size():
    from mmpretrain.models.utils.position_encoding import RotaryEmbeddingFast
    stock, layer = (RotaryEmbeddingFast(8, 4) for _ in range(2))
    assert make_lean(layer, dict(rounds=False)).covered[''] == 'RotaryEmbeddingFast'
    before = {n: b.clone() for n, b in layer.named_buffers()}
    for size in ((4, 4), (3, 5), 2, (4, 4)):
        h, w = size if isinstance(size, tuple) else (size, size)
        x = torch.randn(1, 2, h * w, 8)
        assert torch.equal(layer(x, size), stock(x, size))
    assert layer.patch_resolution == (4, 4)
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())
