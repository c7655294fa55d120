import copy

import pytest
import torch

from mmprotune.lean import make_lean
from mmprotune.lean.memory import KeptBytes
from tests.test_lean.networks import (
    SMALL,
    distance,
    images,
    kept_by,
    ordinary,
    outputs_of,
    prompted,
    step,
)


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


def doubled(module, args, probabilities):
    return 2 * probabilities


@pytest.mark.parametrize('library', ['mmdet', 'mmpretrain', 'BEiT', 'Swin V2'])
@pytest.mark.parametrize('child', ['softmax', 'attn_drop'])
def test_hooks_see_the_probabilities(library, child):
    """As tools that draw attention maps register them."""
    from mmdet.models.backbones import swin
    from mmpretrain.models.utils import attention
    torch.manual_seed(0)
    layer = {'mmdet': lambda: swin.WindowMSA(12, 3, (4, 6)),
             'mmpretrain': lambda: attention.WindowMSA(12, (4, 6), 3),
             'BEiT': lambda: attention.BEiTAttention(12, **BEIT, use_rel_pos_bias=True),
             'Swin V2': lambda: attention.WindowMSAV2(12, (4, 6), 3)}[library]()
    if not hasattr(layer, child):
        pytest.skip('not a module')
    stock = layer.requires_grad_(False)
    layer = copy.deepcopy(stock)
    assert '' in make_lean(layer, dict(rounds=False)).covered
    x = torch.randn(2, 25 if library == 'BEiT' else 24, 12)
    without = layer(x)
    for net in (layer, stock):
        net.get_submodule(child).register_forward_hook(doubled)
    assert not torch.equal(layer(x), without)
    for image in (x, x.clone().requires_grad_()):
        assert torch.equal(layer(image), stock(image))


@pytest.mark.parametrize('backbone, stages', [
    ('mmpretrain_vit', ['layers.*.attn.qkv', 'layers.*.ffn.layers']),
    ('timm_vit', ['timm_model.blocks.*.attn.qkv', 'timm_model.blocks.*.mlp'])])
def test_prompts_at_queries_keys_and_values(backbone, stages):
    model = prompted(SMALL[backbone], stages=stages,
                     prompt=dict(type='mmprotune.PromptBlock', reduction=16)).double()
    x = images(2, 3, 96, 64, dtype=torch.float64)
    outputs, gradients = step(model, x)
    expected, exact = step(ordinary(model), x)
    assert distance(outputs, expected) < 1e-12
    assert len(gradients) == 1 + 6 * len(model.stages) and gradients.keys() == exact.keys()
    assert all(distance([gradients[name]], [exact[name]]) < 1e-11 for name in gradients)
    assert sum(kept_by(model, x).values()) < 0.8 * sum(kept_by(ordinary(model), x).values())


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('to_itself', [True, False])
def test_without_weights_the_stock_layers_own_kernel(batch_first, to_itself):
    """As ``nn.TransformerEncoderLayer`` calls it: bitwise, with a graph and without."""
    torch.manual_seed(0)
    stock = torch.nn.MultiheadAttention(64, 4, batch_first=batch_first).eval().requires_grad_(False)
    layer = copy.deepcopy(stock)
    assert '' in make_lean(layer, dict(rounds=False)).covered
    for grad in (True, False):
        found = []
        for net in (layer, stock):
            x = torch.randn(4, 37, 64, generator=torch.Generator().manual_seed(1))
            x.requires_grad_(grad)
            other = x if to_itself else x.flip(1)
            y, weights = net(x, other, other, need_weights=False)
            assert weights is None
            found.append([y.detach()])
            if grad:
                found[-1].append(torch.autograd.grad(y.sin().sum(), x)[0])
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('version', ['WindowMSA', 'WindowMSAV2'])
def test_no_windows(version):
    from mmpretrain.models.utils import attention
    layer = getattr(attention, version)(12, (4, 6), 3).requires_grad_(False)
    assert '' in make_lean(layer, dict(rounds=False)).covered
    x = torch.zeros(0, 24, 12, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
