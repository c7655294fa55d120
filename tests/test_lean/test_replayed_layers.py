"""Layers whose host is run again: attention that is fused, rotary or SAM's, and gated MLPs."""
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmprotune.lean import make_lean
from mmprotune.lean.base import LeanLayer
from mmprotune.lean.convert import restore, store_weights
from mmprotune.lean.functional.attention import CHUNK_BYTES
from mmprotune.lean.graph import TORCH_BEFORE_2_4
from mmprotune.lean.memory import KeptBytes
from tests.test_lean.functions import draw
from tests.test_lean.networks import SMALL, distance, images, kept_by, ordinary, prompted

ROPE = draw(24, 16, dtype=torch.float32, seed=5)


def mmpretrain(name, *args, **kwargs):
    from mmpretrain.models.backbones import vit_eva02, vit_sam
    from mmpretrain.models.utils import RotaryEmbeddingFast, SwiGLUFFN, attention
    if name == 'AttentionWithRoPE':
        kwargs['rope'] = RotaryEmbeddingFast(args[0] // args[1], (4, 4))
    return dict(MultiheadAttention=attention.MultiheadAttention, Attention=vit_sam.Attention,
                AttentionWithRoPE=vit_eva02.AttentionWithRoPE, SwiGLUFFN=SwiGLUFFN)[name](
                    *args, **kwargs)


def timm(name, *args, norm=False, **kwargs):
    layers, eva = pytest.importorskip('timm.layers'), pytest.importorskip('timm.models.eva')
    if norm:
        kwargs['norm_layer'] = layers.LayerNorm
    return getattr(eva if name == 'EvaAttention' else layers, name)(*args, **kwargs)


# How to build one; the shape of its input; what else it takes; the floats a token that it keeps
# behind a norm, which keeps its input and two numbers itself.
LAYERS = {
    'fused': (partial(mmpretrain, 'MultiheadAttention', 12, 3), (2, 25, 12), {}, 36),
    'fused, scaled': (partial(mmpretrain, 'MultiheadAttention', 12, 3, layer_scale_init_value=0.1),
                      (2, 25, 12), {}, 36),
    'rotary': (partial(mmpretrain, 'AttentionWithRoPE', 24, 3, qkv_bias=True), (2, 25, 24),
               dict(patch_resolution=(4, 6)), 72),
    'decomposed': (partial(mmpretrain, 'Attention', 12, 3, use_rel_pos=True, input_size=(4, 6)),
                   (2, 4, 6, 12), {}, 36),
    'windows': (partial(mmpretrain, 'Attention', 12, 3), (2, 4, 6, 12), {}, 36),
    'SwiGLU': (partial(mmpretrain, 'SwiGLUFFN', 12, 32, norm_cfg=dict(type='LN')), (2, 25, 12), {},
               64),
    'timm': (partial(timm, 'Attention', 12, 3, qkv_bias=True), (2, 25, 12),
             dict(attn_mask=None, is_causal=False), 36),
    'timm, norms': (partial(timm, 'Attention', 12, 3, qk_norm=True, scale_norm=True, norm=True),
                    (2, 25, 12), {}, 36 + 12 + 2),
    'timm, rotary': (partial(timm, 'AttentionRope', 24, 3, rotate_half=True), (2, 25, 24),
                     dict(rope=ROPE), 72),
    'EVA': (partial(timm, 'EvaAttention', 24, 3, scale_norm=False), (2, 25, 24), dict(rope=ROPE),
            72),
    'EVA, no bias': (partial(timm, 'EvaAttention', 24, 3, scale_norm=False, qkv_bias=False,
                             rotate_half=True), (2, 25, 24), dict(rope=ROPE), 72),
    'EVA, bias apart': (partial(timm, 'EvaAttention', 24, 3, scale_norm=False,
                                qkv_bias_separate=True), (2, 25, 24), dict(rope=ROPE), 72),
    'EVA, in three': (partial(timm, 'EvaAttention', 24, 3, qkv_fused=False, norm=True),
                      (2, 25, 24), dict(rope=ROPE), 72 + 24 + 2),
    'timm, SwiGLU': (partial(timm, 'SwiGLU', 12, 32, norm=True), (2, 25, 12), {}, 64),
    'timm, GLU': (partial(timm, 'GluMlp', 12, 64, act_layer=nn.SiLU, gate_last=False), (2, 25, 12),
                  {}, 64),
}


def behind_a_norm(name, **options):
    """The layer behind a LayerNorm: lean, as it was, and in double precision."""
    build, shape, kwargs, floats = LAYERS[name]
    torch.manual_seed(0)
    lean = nn.ModuleList((nn.LayerNorm(shape[-1]), build()))
    for p in lean.parameters():
        nn.init.normal_(p, std=0.4).requires_grad_(False)
    stock, exact = copy.deepcopy(lean), copy.deepcopy(lean).double()
    make_lean(lean, dict(rounds=False, **options))
    return lean, stock, exact


def run(net, name, x):
    """Output, gradient, kept bytes."""
    x = x.detach().clone().to(next(net.parameters()).dtype).requires_grad_()
    kwargs = {k: v.to(x.dtype) if isinstance(v, torch.Tensor) else v
              for k, v in LAYERS[name][2].items()}
    with KeptBytes(net) as kept:
        y = net[1](net[0](x), **kwargs)
        count = kept.total()
    y.sin().sum().backward()
    return y.detach(), x.grad, count


@pytest.mark.parametrize('again', [False, True])
@pytest.mark.parametrize('name', LAYERS)
def test_exact_and_keeps_what_its_projection_made(name, again):
    """Or, applied again, nothing that the norm before it does not keep."""
    lean, stock, exact = behind_a_norm(name)
    assert isinstance(lean[1], LeanLayer)
    for module in lean.modules():
        if isinstance(module, LeanLayer):
            module.lean.recomputes = again
    _, shape, kwargs, floats = LAYERS[name]
    x = draw(*shape, dtype=torch.float32)
    (y, gradient, kept), (expected, of_stock, more), (_, reference, _) = (
        run(net, name, x) for net in (lean, stock, exact))
    assert torch.equal(y, expected)
    off = distance([gradient.double()], [reference])
    assert off < 2e-6 and off < 1.3 * distance([of_stock.double()], [reference])
    if again and name != 'EVA, bias apart':  # which adds it to the projection in place
        floats -= dict(SwiGLU=64).get(name, 64 if 'GLU' in name else 3 * shape[-1])
    tokens = x.numel() // shape[-1]
    assert kept == 4 * tokens * (shape[-1] + 2 + floats) + (ROPE.nbytes if 'rope' in kwargs else 0)
    assert kept < (1. if TORCH_BEFORE_2_4 else 0.85) * more  # whose attention keeps other things


@pytest.mark.parametrize('name', ['rotary', 'decomposed', 'windows'])
def test_one_matrix_of_probabilities_at_a_time(name, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, 'cpu', 1)
    lean, stock, exact = behind_a_norm(name)
    x = draw(*LAYERS[name][1], dtype=torch.float32)
    (y, gradient, _), (expected, *_), (_, reference, _) = (
        run(net, name, x) for net in (lean, stock, exact))
    assert torch.equal(y, expected)
    assert distance([gradient.double()], [reference]) < 2e-6


@pytest.mark.parametrize('name', LAYERS)
def test_within_activation_checkpointing(name):
    """Which hands out what is saved only once."""
    _, shape, kwargs, _ = LAYERS[name]
    lean, _, _ = behind_a_norm(name)

    def gradient(wrap):
        x = draw(*shape, dtype=torch.float32).requires_grad_()
        wrap(lambda x: lean[1](lean[0](x), **kwargs))(x).sin().sum().backward()
        return x.grad

    assert torch.equal(gradient(lambda net: net),
                       gradient(lambda net: partial(checkpoint, net, use_reentrant=False)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(
    torch.float16, marks=pytest.mark.skipif(TORCH_BEFORE_2_4, reason='no such autocast there'))])
@pytest.mark.parametrize('name', LAYERS)
def test_under_autocast_the_hosts_gradient(name, dtype):
    lean, stock, _ = behind_a_norm(name)
    x = draw(*LAYERS[name][1], dtype=torch.float32)
    found = []
    for net in (lean, stock):
        image = x.clone().requires_grad_()
        with torch.autocast('cpu', dtype):
            y = net[1](net[0](image), **LAYERS[name][2])
        y.float().sin().sum().backward()
        found.append((y, image.grad))
    (y, gradient), (expected, of_stock) = found
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    assert distance([gradient], [of_stock]) < 2e-2


@pytest.mark.parametrize('name', [n for n in LAYERS if 'norms' in n or 'SwiGLU' in n or n in (
    'decomposed', 'rotary')])
def test_parameters_that_are_passed_in(name):
    """As ``functional_call`` passes them: the layer holds its own again in the backward pass."""
    lean, stock, _ = behind_a_norm(name)
    given = {n: draw(*t.shape, dtype=torch.float32, seed=9)
             for n, t in (*stock.named_parameters(), *stock.named_buffers())}
    x = draw(*LAYERS[name][1], dtype=torch.float32)

    class Net(nn.Module):

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net[1](self.net[0](x), **{'patch_resolution': (4, 4)} if name == 'rotary'
                               else LAYERS[name][2])

    if name == 'rotary':
        x = x[:, :17]
    gradients = []
    for net in (lean, stock):
        image = x.clone().requires_grad_()
        y = torch.func.functional_call(Net(net), {f'net.{n}': t for n, t in given.items()},
                                       (image, ))
        gradients.append(torch.autograd.grad(y.sin().sum(), image)[0])
    assert distance(gradients[:1], gradients[1:]) < 1e-5


# --- what it leaves to the host ---------------------------------------------------------------


def trained(module):
    for p in module.parameters():
        p.requires_grad_()


def hooked(module):
    module.register_forward_hook(lambda module, args, y: 2 * y)


def dropping(module):
    module.p = 0.5


@pytest.mark.parametrize('name, child, change', [
    ('timm, norms', 'q_norm', trained), ('timm, norms', 'k_norm', hooked),
    ('timm', 'attn_drop', dropping), ('EVA', 'q_norm', hooked), ('rotary', 'rope', hooked),
    ('rotary', 'attn_drop', dropping), ('SwiGLU', 'norm', trained),
    ('timm, SwiGLU', 'drop1', dropping), ('timm, GLU', 'act', hooked)],
    ids=lambda value: getattr(value, '__name__', value))
def test_what_is_inside_and_does_more_runs_once(name, child, change):
    """In the host's own way, so that what trains gets its gradient, and dropout draws once."""
    lean, stock, _ = behind_a_norm(name)
    for net in (lean, stock):
        change(net[1].get_submodule(child))
    x = draw(*LAYERS[name][1], dtype=torch.float32)
    found = []
    for net in (lean, stock):
        net.train()
        torch.manual_seed(3)
        y, gradient, _ = run(net, name, x)
        found.append([y, gradient, *(p.grad for p in net.parameters() if p.requires_grad)])
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


def test_masks_are_the_hosts():
    lean, stock, _ = behind_a_norm('timm')
    mask = torch.rand(25, 25) < 0.5
    mask |= torch.eye(25, dtype=torch.bool)
    x = draw(2, 25, 12, dtype=torch.float32)
    for kwargs in (dict(attn_mask=mask), dict(is_causal=True)):
        a, b = (net[1](net[0](x.clone().requires_grad_()), **kwargs) for net in (lean, stock))
        assert torch.equal(a, b) and not torch.equal(a, stock[1](stock[0](x)))


@pytest.mark.parametrize('kwargs', [dict(qk_scale=0.1), dict(v_shortcut=True, input_dims=24)],
                         ids=str)
def test_other_ways_of_the_fused_attention_are_the_hosts(kwargs):
    torch.manual_seed(0)
    stock = mmpretrain('MultiheadAttention', 12, 1, **kwargs).requires_grad_(False)
    lean = copy.deepcopy(stock)
    make_lean(lean, dict(rounds=False))
    x = draw(2, 25, stock.input_dims, dtype=torch.float32).requires_grad_()
    assert torch.equal(lean(x), stock(x))


def test_a_forward_with_unknown_names_is_left_alone(monkeypatch):
    """timm changes; a version that does more than is known here stays the host's."""
    attention = pytest.importorskip('timm.layers').Attention

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.proj(x * self.temperature)

    for known in (True, False):
        if not known:
            monkeypatch.setattr(attention, 'forward', forward)
        layer = attention(12, 3).requires_grad_(False)
        make_lean(layer, dict(rounds=False))
        assert isinstance(layer, LeanLayer) == known


def test_attention_may_stay_as_it_is():
    for name in ('fused', 'rotary', 'decomposed', 'timm', 'EVA'):
        assert not isinstance(behind_a_norm(name, attention=False)[0][1], LeanLayer)


# --- whole backbones --------------------------------------------------------------------------


@pytest.mark.parametrize('name, share', [
    ('mmpretrain_vit', 0.65), ('eva02', 0.4), ('sam', 0.45), ('timm_vit', 0.6),
    ('timm_eva02', 0.5), ('dinov3', 0.55)])
def test_kept_bytes_of_a_family(name, share):
    """Of ordinary layers' bytes, prompts included."""
    model = prompted(SMALL[name])
    x = images(2, 3, 96, 64)
    lean, naive = (sum(kept_by(m, x).values()) for m in (model, ordinary(model)))
    assert lean <= share * naive


@pytest.mark.parametrize('dtype', ['int8', 'bfloat16'])
@pytest.mark.parametrize('name', LAYERS)
def test_weights_in_a_lower_precision(name, dtype):
    """What the ordinary layer computes with the weights that they stand for, graph or none."""
    lean, *_ = behind_a_norm(name)
    assert store_weights(lean, dtype) == []
    exact = copy.deepcopy(lean)
    restore(exact)
    exact.float()
    x = draw(*LAYERS[name][1], dtype=torch.float32)
    (y, gradient, _), (expected, reference, _) = (run(net, name, x) for net in (lean, exact))
    assert distance([y], [expected]) < 1e-6 and distance([gradient], [reference]) < 2e-6
    with torch.no_grad():
        assert distance([lean[1](lean[0](x), **LAYERS[name][2])], [expected]) < 1e-6
