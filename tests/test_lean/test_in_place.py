"""What lean functions and layers return is an ordinary tensor: the next layer may change it."""
import copy
import importlib
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmprotune.lean import functional as lean
from mmprotune.lean import make_lean, table
from mmprotune.lean.base import LeanLayer
from mmprotune.lean.functional import activations
from mmprotune.lean.graph import LeanState
from mmprotune.lean.layers import Smooth
from mmprotune.lean.prompts import PromptState, prompt_of
from mmprotune.models.prompts.prompt_block import PromptBlock


def change_a_part(y):
    y.narrow(-1, 0, 1).mul_(3)
    return y


CHANGES = {
    'relu_': lambda y: y.relu_(),
    'add_': lambda y: y.add_(1.5),
    'mul_': lambda y: y.mul_(2),
    'part': change_a_part,
}


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensor(shape, layout='plain', dtype=torch.float64, seed=0):
    """A tensor in some layout; 'strided' has gaps, 'expanded' overlaps."""
    if layout == 'transposed' and len(shape) > 1:
        return draw(*shape[:-2], shape[-1], shape[-2], dtype=dtype, seed=seed).transpose(-1, -2)
    if layout == 'strided':
        return draw(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed)[..., ::2]
    if layout == 'expanded':
        return draw(1, *shape[1:], dtype=dtype, seed=seed).expand(shape)
    if layout == 'channels_last' and len(shape) == 4:
        return draw(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)
    return draw(*shape, dtype=dtype, seed=seed)


def conv(dims, **kwargs):
    settings = lean.Convolution([1] * dims, [1] * dims, [1] * dims, 1, **kwargs)
    weight, bias = draw(3, 3, *[3] * dims, seed=1), draw(3, seed=2)
    plain, transposed = ((F.conv1d, F.conv_transpose1d), (F.conv2d, F.conv_transpose2d),
                         (F.conv3d, F.conv_transpose3d))[dims - 1]
    function = transposed if settings.transposed else plain
    return (lambda x: lean.convolution(x, weight, bias, settings),
            lambda x: function(x, weight, bias, padding=1))


def norm(function, stock, channels=3):
    mean, var, weight, bias = (draw(channels, seed=s) for s in range(1, 5))
    return (lambda x: function(x, mean, var.abs() + 0.1, weight, bias),
            lambda x: stock(x, mean, var.abs() + 0.1, weight, bias))


def affine(function, stock, size):
    weight, bias = draw(size, seed=1), draw(size, seed=2)
    return lambda x: function(x, weight, bias), lambda x: stock(x, weight, bias)


def matrix(**kwargs):
    weight, bias = draw(4, 6, seed=1), draw(4, seed=2)
    return (lambda x: lean.linear(x, weight, bias, **kwargs), lambda x: F.linear(x, weight, bias))


def gate(x):
    return x * torch.sigmoid(x)


def cosines(qkv):
    """Queries and keys of length one in each of two heads, and the values."""
    q, k, v = qkv.chunk(3, -1)
    return *(F.normalize(t.unflatten(-1, (2, -1)), dim=-1).flatten(-2) for t in (q, k)), v


def stock_attention(q, k, v):
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(-2, -3) for t in (q, k, v))
    return ((q * 0.5 @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(-2, -3).flatten(-2)


MAPS = [(2, 3, 6, 7), (3, 6, 7)]
FUNCTIONS = {
    'convolution 1d': (*conv(1), [(2, 3, 6), (3, 6)]),
    'convolution 2d': (*conv(2), MAPS),
    'convolution 3d': (*conv(3), [(2, 3, 4, 5, 6), (3, 4, 5, 6)]),
    'transposed 1d': (*conv(1, transposed=True), [(2, 3, 6), (3, 6)]),
    'transposed 2d': (*conv(2, transposed=True), MAPS),
    'transposed 3d': (*conv(3, transposed=True), [(2, 3, 4, 5, 6), (3, 4, 5, 6)]),
    'linear': (*matrix(), [(6, ), (5, 6), (2, 5, 6), (2, 3, 4, 6)]),
    'fast linear': (*matrix(fast=True), [(6, ), (5, 6), (2, 5, 6), (2, 3, 4, 6)]),
    'without a bias': (lambda x: lean.linear(x, draw(4, 6, seed=1)),
                       lambda x: F.linear(x, draw(4, 6, seed=1)),
                       [(6, ), (5, 6), (2, 5, 6), (2, 3, 4, 6)]),
    'batch norm': (*norm(lean.batch_norm, F.batch_norm),
                   [(4, 3), (2, 3, 5), (2, 3, 6, 7), (2, 3, 2, 4, 5)]),
    'layer norm': (*affine(lambda x, *a: lean.layer_norm(x, (6, ), *a),
                           lambda x, *a: F.layer_norm(x, (6, ), *a), 6),
                   [(6, ), (5, 6), (2, 5, 6), (2, 3, 4, 6)]),
    'group norm': (*affine(lambda x, *a: lean.group_norm(x, 3, *a),
                           lambda x, *a: F.group_norm(x, 3, *a), 6),
                   [(4, 6), (2, 6, 5), (2, 6, 4, 5)]),
    'relu': (lean.relu, F.relu, [(6, ), (2, 6), *MAPS]),
    'hardtanh': (lean.hardtanh, F.hardtanh, [(6, ), (2, 6), *MAPS]),
    'leaky relu': (lean.leaky_relu, F.leaky_relu, [(6, ), (2, 6), *MAPS]),
    'hardsigmoid': (lean.hardsigmoid, F.hardsigmoid, [(6, ), (2, 6), *MAPS]),
    'gelu': (lambda x: lean.activation(x, activations.GELU), F.gelu, [(6, ), (2, 6), *MAPS]),
    'gelu tanh': (lambda x: lean.activation(x, activations.GELU_TANH),
                  lambda x: F.gelu(x, approximate='tanh'), [(6, ), *MAPS]),
    'silu': (lambda x: lean.activation(x, activations.SILU), F.silu, [(6, ), *MAPS]),
    'hardswish': (lambda x: lean.activation(x, activations.HARDSWISH), F.hardswish,
                  [(6, ), *MAPS]),
    'mish': (lambda x: lean.activation(x, activations.MISH), F.mish, [(6, ), *MAPS]),
    'swish': (lambda x: lean.activation(x, activations.SWISH), gate, [(6, ), *MAPS]),
    'quick gelu': (lambda x: lean.activation(x, activations.QUICK_GELU),
                   lambda x: x * torch.sigmoid(1.702 * x), [(6, ), *MAPS]),
    'replayed': (lambda x: lean.replayed(gate, x), gate, [(6, ), *MAPS]),
    'replayed view': (lambda x: lean.replayed(lambda x: x[..., 1:], x), lambda x: x[..., 1:],
                      [(6, ), *MAPS]),
    'recomputed': (lambda x: lean.activation(lean.linear(x, draw(9, 6, seed=1), None, LeanState()),
                                             activations.GELU),
                   lambda x: F.gelu(F.linear(x, draw(9, 6, seed=1))), [(5, 6), (2, 3, 4, 6)]),
    'max pooling': (lambda x: lean.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1),
                    MAPS),
    'max pooling of one pixel': (lambda x: lean.max_pool2d(x, 1), lambda x: F.max_pool2d(x, 1),
                                 MAPS),
    'average pooling': (lambda x: lean.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), MAPS),
    'average pooling of one pixel': (lambda x: lean.avg_pool2d(x, 1),
                                     lambda x: F.avg_pool2d(x, 1), MAPS),
    'adaptive pooling': (lambda x: lean.adaptive_avg_pool2d(x, 2),
                         lambda x: F.adaptive_avg_pool2d(x, 2), MAPS),
    'global pooling': (lambda x: lean.adaptive_avg_pool2d(x, 1),
                       lambda x: F.adaptive_avg_pool2d(x, 1), MAPS),
    'adaptive pooling to the same size': (lambda x: lean.adaptive_avg_pool2d(x, (None, None)),
                                          lambda x: F.adaptive_avg_pool2d(x, (None, None)), MAPS),
    'packed attention': (lambda x: lean.packed_attention(x, 2, 0.5),
                         lambda x: stock_attention(*x.chunk(3, -1)), [(2, 5, 12), (2, 1, 12)]),
    'cosine attention': (
        lambda x: lean.cosine_attention(x, 2, torch.full((2, 1, 1), 3., dtype=x.dtype)),
        lambda x: stock_attention(*(unit * s for unit, s in zip(
            cosines(x), (6, 1, 1)))), [(2, 5, 12), (2, 1, 12)]),
    'attention': (lambda x: lean.attention(x, x * 2, x + 1, 2, 0.5),
                  lambda x: stock_attention(x, x * 2, x + 1), [(2, 5, 12), (2, 1, 12)]),
    'unfold': (lambda x: lean.unfold(x, 3, padding=1), lambda x: F.unfold(x, 3, padding=1), MAPS),
    'rearranged': (lambda x: lean.rearranged(x, x.roll(1, -1), lambda x: x.roll(1, -1)),
                   lambda x: x.roll(1, -1), MAPS),
}
# Their gradient needs their output, in PyTorch too.
FROM_OUTPUT = {'sigmoid': (lean.sigmoid, torch.sigmoid), 'tanh': (lean.tanh, torch.tanh)}


# PyTorch's sixth of hardsigmoid's gradient is one in single precision.
TOLERANCE = 1e-7


def compare(function, stock, x, change, tolerance=TOLERANCE):
    """Output and gradient of a function whose output is changed in place, against PyTorch's."""
    found = []
    for f, in_place in ((function, True), (stock, False)):
        leaf = x.detach().requires_grad_()
        y = f(leaf * 1)
        y = change(y if in_place else y.clone())
        grad, = torch.autograd.grad(y, leaf, draw(*y.shape, dtype=y.dtype, seed=9))
        found.append((y.detach(), grad))
    for a, b in zip(*found):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_functions_are_all_of_them():
    named = {name for name in lean.__all__ if name[0].islower()}
    assert named - {'cast', 'check_frozen', 'activation'} <= {
        n.replace(' ', '_') for n in (*FUNCTIONS, *FROM_OUTPUT)} | {
            'convolution', 'max_pool2d', 'avg_pool2d', 'adaptive_avg_pool2d', 'clamp'}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('layout', ['plain', 'transposed', 'strided', 'expanded', 'channels_last'])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions(name, layout, change):
    function, stock, shapes = FUNCTIONS[name]
    for shape in shapes:
        compare(function, stock, tensor(shape, layout), CHANGES[change])


@pytest.mark.parametrize('name', FROM_OUTPUT)
def test_functions_that_keep_their_output(name):
    """They refuse in the backward pass, as PyTorch does, and only there."""
    for function in FROM_OUTPUT[name]:
        y = function(draw(2, 3).requires_grad_() * 1).add_(1)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.sum().backward()


@pytest.mark.parametrize('shape', [(300, 64), (2, 150, 64), (3, 4, 25, 64)])
@pytest.mark.parametrize('layout', ['plain', 'transposed', 'strided'])
def test_products_by_onednn(shape, layout):
    """They are in single precision, and only at such sizes."""
    weight, bias = draw(96, 64, dtype=torch.float32), draw(96, dtype=torch.float32)
    x = tensor(shape, layout, dtype=torch.float32)
    for b in (None, bias):
        for change in CHANGES.values():
            compare(partial(lean.linear, weight=weight, bias=b, fast=True),
                    partial(F.linear, weight=weight, bias=b), x, change, tolerance=1e-3)


# --- layers -----------------------------------------------------------------------------------


def host(path, *args, **kwargs):
    module, _, name = path.rpartition('.')
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def calls(layer, *args):
    """Calls a layer, and takes the first of what it returns."""

    def call(x):
        y = layer(x, *args)
        return y[0] if isinstance(y, tuple) else y

    return call


# Layer, further arguments, shapes of the input.
ROTARY = 'mmpretrain.models.utils.position_encoding.RotaryEmbeddingFast'
EVA02 = 'mmpretrain.models.backbones.vit_eva02.AttentionWithRoPE'
SAM = 'mmpretrain.models.backbones.vit_sam.Attention'
LAYERS = {
    'torch.nn.modules.conv.Conv1d': (lambda: nn.Conv1d(6, 6, 3), (), [(2, 6, 5), (6, 5)]),
    'torch.nn.modules.conv.Conv2d': (lambda: nn.Conv2d(3, 4, 3, padding='same'), (), MAPS),
    'torch.nn.modules.conv.Conv3d': (lambda: nn.Conv3d(3, 4, 2), (), [(2, 3, 4, 5, 6),
                                                                      (3, 4, 5, 6)]),
    'torch.nn.modules.conv.ConvTranspose1d': (lambda: nn.ConvTranspose1d(6, 4, 3), (),
                                              [(2, 6, 5), (6, 5)]),
    'torch.nn.modules.conv.ConvTranspose2d': (lambda: nn.ConvTranspose2d(3, 4, 2, 2), (), MAPS),
    'torch.nn.modules.conv.ConvTranspose3d': (lambda: nn.ConvTranspose3d(3, 4, 2), (),
                                              [(2, 3, 4, 5, 6), (3, 4, 5, 6)]),
    'mmcv.cnn.bricks.wrappers.Conv2d': (3, 4, 3), 'mmcv.cnn.bricks.wrappers.Conv3d': (3, 4, 2),
    'mmcv.cnn.bricks.wrappers.ConvTranspose2d': (3, 4, 2),
    'mmcv.cnn.bricks.wrappers.ConvTranspose3d': (3, 4, 2),
    'torch.nn.modules.linear.Linear': (lambda: nn.Linear(7, 5), (), [(7, ), (4, 7), *MAPS]),
    'mmcv.cnn.bricks.wrappers.Linear': (7, 5),
    'torch.nn.modules.batchnorm._BatchNorm': (lambda: nn.BatchNorm2d(3).eval(), (), MAPS[:1]),
    'torch.nn.modules.batchnorm.SyncBatchNorm': (lambda: nn.SyncBatchNorm(3).eval(), (),
                                                 MAPS[:1]),
    'torch.nn.modules.normalization.LayerNorm': (lambda: nn.LayerNorm(7), (), [(7, ), *MAPS]),
    'torch.nn.modules.normalization.GroupNorm': (lambda: nn.GroupNorm(3, 3), (), MAPS[:1]),
    'mmpretrain.models.utils.norm.LayerNorm2d': (3, ),
    'torch.nn.modules.activation.ReLU': (nn.ReLU, (), MAPS),
    'torch.nn.modules.activation.Hardtanh': (nn.ReLU6, (), MAPS),
    'torch.nn.modules.activation.LeakyReLU': (nn.LeakyReLU, (), MAPS),
    'torch.nn.modules.activation.Hardsigmoid': (nn.Hardsigmoid, (), MAPS),
    'torch.nn.modules.activation.GELU': (nn.GELU, (), MAPS),
    'torch.nn.modules.activation.SiLU': (nn.SiLU, (), MAPS),
    'torch.nn.modules.activation.Hardswish': (nn.Hardswish, (), MAPS),
    'torch.nn.modules.activation.Mish': (nn.Mish, (), MAPS),
    'mmcv.cnn.bricks.swish.Swish': (),
    'torch.nn.modules.pooling.MaxPool2d': (lambda: nn.MaxPool2d(2), (), MAPS),
    'mmcv.cnn.bricks.wrappers.MaxPool2d': (2, ),
    'torch.nn.modules.pooling.AvgPool2d': (lambda: nn.AvgPool2d(2), (), MAPS),
    'torch.nn.modules.pooling.AdaptiveAvgPool2d': (lambda: nn.AdaptiveAvgPool2d(1), (), MAPS),
    'torch.nn.modules.fold.Unfold': (lambda: nn.Unfold(2), (), MAPS),
    'mmdet.models.backbones.swin.WindowMSA': (6, ), 'mmseg.models.backbones.swin.WindowMSA': (6, ),
    'mmpretrain.models.utils.attention.WindowMSA': (6, ),
    'mmseg.models.backbones.beit.BEiTAttention': (6, ),
    'mmpretrain.models.utils.attention.BEiTAttention': (6, ),
    'mmpretrain.models.utils.attention.WindowMSAV2': (6, ),
    ROTARY: (lambda: host(ROTARY, 8, (2, 3)), ((2, 3), ), [(1, 2, 6, 8)]),
    'mmdet.models.backbones.swin.ShiftWindowMSA': (6, ),
    'mmseg.models.backbones.swin.ShiftWindowMSA': (6, ),
    EVA02: (lambda: host(EVA02, 8, 2, rope=host(ROTARY, 4, (2, 3))), ((2, 3), ), [(4, 7, 8)]),
    SAM: (lambda: host(SAM, 6, 2, use_rel_pos=True, input_size=(2, 3)), (), [(4, 2, 3, 6)]),
    'mmpretrain.models.utils.attention.MultiheadAttention': (6, 2),
    'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN': (6, 8),
    'mmpretrain.models.utils.clip_generator_helper.QuickGELU': (),
    'timm.layers.activations.GELU': (), 'timm.layers.activations.GELUTanh': (),
    'timm.layers.activations.QuickGELU': (),
    'timm.layers.norm.LayerNorm': (7, ),
    'timm.layers.attention.Attention': (6, 2), 'timm.layers.attention.AttentionRope': (6, 2),
    'timm.models.eva.EvaAttention': (
        lambda: host('timm.models.eva.EvaAttention', 6, 2, scale_norm=False), (), [(2, 5, 6)]),
    'timm.layers.mlp.SwiGLU': (6, 8),
    'timm.layers.mlp.GluMlp': (6, 8),
}


def layer_of(path):
    entry = LAYERS[path]
    if entry and callable(entry[0]):
        make, args, shapes = entry
        return make(), args, shapes
    if path.endswith('.ShiftWindowMSA'):
        return host(path, 6, 2, window_size=3, shift_size=1), ((4, 5), ), [(2, 20, 6)]
    if path.endswith('.BEiTAttention'):
        layer = host(path, 6, num_heads=2, window_size=(2, 3), use_rel_pos_bias=True)
        for p in layer.parameters():
            nn.init.normal_(p)
        return layer, (), [(4, 7, 6)]
    if path.endswith(('.WindowMSA', '.WindowMSAV2')):
        return host(path, 6, num_heads=2, window_size=(2, 3)), (), [(4, 6, 6)]
    tokens = path.endswith(('.MultiheadAttention', '.SwiGLUFFN', '.GluMlp', '.SwiGLU', '.Attention',
                            '.AttentionRope'))
    shapes = [(2, 3, 4, 5, 6)] if path.endswith('3d') else [(2, 5, 6)] if tokens else MAPS[:1]
    return host(path, *entry), (), shapes


def lean_layer(layer):
    """A frozen layer, lean with all the layers in it; and the stock one."""
    layer = layer.double()
    for p in layer.parameters():
        p.requires_grad_(False)
    stock = copy.deepcopy(layer)
    for child in layer.modules():
        lean = table.lean_type(child)
        if lean is not None:
            table.swap(child, lean)
    assert isinstance(layer, LeanLayer)
    return layer, stock


def test_the_layers_are_all_of_them():
    others = {'torch.nn.modules.activation.Sigmoid', 'torch.nn.modules.activation.Tanh',
              'torch.nn.modules.activation.MultiheadAttention'}
    assert set(table._TABLE) == set(LAYERS) | others


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('path', LAYERS)
def test_layers(path, change):
    torch.manual_seed(0)
    layer, args, shapes = layer_of(path)
    layer, stock = lean_layer(layer)
    for shape in shapes:
        for layout in ('plain', 'strided'):
            compare(calls(layer, *args), calls(stock, *args), tensor(shape, layout),
                    CHANGES[change])


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('saves', ['bottleneck', 'input'])
def test_prompts(saves, change):
    stock = PromptBlock(3, 1, zero_init=False).double()
    block = copy.deepcopy(stock)
    block.lean = PromptState(saves)
    for layout in ('plain', 'strided'):
        compare(partial(prompt_of, block), stock, tensor(MAPS[0], layout), CHANGES[change])


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('batch_first', [False, True])
def test_multihead_attention(batch_first, change):
    torch.manual_seed(0)
    layer, stock = lean_layer(nn.MultiheadAttention(6, 2, batch_first=batch_first))
    for own in (layer, stock):
        own.eval()


    def attend(module, x, to_itself):
        other = x if to_itself else x * 2
        return module(x, other, other, need_weights=False)[0]

    for shape in ((2, 5, 6), (5, 6)):
        for to_itself in (True, False):
            compare(partial(attend, layer, to_itself=to_itself),
                    partial(attend, stock, to_itself=to_itself), draw(*shape), CHANGES[change])


@pytest.mark.parametrize('layer', [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardsigmoid, nn.Hardswish,
                                   nn.SiLU, nn.Mish, nn.Dropout])
@pytest.mark.parametrize('before', [nn.Linear(64, 96), nn.Conv2d(64, 4, 1), nn.BatchNorm2d(64)])
def test_layers_that_work_in_place(before, layer):
    """As a classifier's ``Linear, ReLU(True), Dropout``: in single precision, by any kernel."""
    stock = nn.Sequential(copy.deepcopy(before), layer(inplace=True)).eval()
    for p in stock.parameters():
        p.requires_grad_(False)
    own = copy.deepcopy(stock)
    for child in own:
        if table.lean_type(child) is not None:
            table.swap(child, table.lean_type(child)).rounds = True
    shape = (3, 4, 25, 64) if isinstance(before, nn.Linear) else (3, 64, 10, 10)
    compare(own, stock, tensor(shape, dtype=torch.float32), lambda y: y, tolerance=1e-4)


class Doubled(nn.Module):
    """Reads again what an activation was given."""

    def __init__(self, layer, act):
        super().__init__()
        self.layer, self.norm, self.act = layer, nn.BatchNorm2d(4), act

    def forward(self, x):
        y = self.norm(self.layer(x))
        part = y[:, 1:]
        return y + self.act(y) + part.sin().sum(1, keepdim=True)


@pytest.mark.parametrize('again', [False, True])
@pytest.mark.parametrize('act', [nn.ReLU, nn.LeakyReLU, nn.Hardsigmoid, nn.Hardswish, nn.SiLU,
                                 nn.Mish])
def test_whoever_holds_what_is_changed_sees_it(act, again):
    torch.manual_seed(0)
    stock = Doubled(nn.Conv2d(3, 4, 1), act(inplace=True)).eval().requires_grad_(False)
    own = copy.deepcopy(stock)
    report = make_lean(own, dict(rounds=False, recompute=again))
    assert bool(report.recomputed) == (again and isinstance(own.act, Smooth))
    x = draw(2, 3, 6, 7, dtype=torch.float32)
    found = []
    for net in (own, stock):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        found.append((y.detach(), torch.autograd.grad(y.sin().sum(), leaf)[0]))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    with torch.no_grad():
        assert torch.equal(own(x), found[0][0])


# --- weights that are changed between the forward and the backward pass ------------------------


def refuses(net, x, name):
    """Whether a change of a tensor, before the backward pass, is refused there."""
    net = copy.deepcopy(net)
    y = net(x.clone().requires_grad_() * 1)
    changed = {**dict(net.named_parameters()), **dict(net.named_buffers())}[name]
    with torch.no_grad():
        changed.mul_(3)
    try:
        y.sum().backward()
    except RuntimeError as error:
        return 'modified by an inplace operation' in str(error)
    return False


@pytest.mark.parametrize('norm', [nn.BatchNorm2d(8), nn.Identity()])
def test_layers_that_are_applied_again_refuse_other_weights(norm):
    """Of the biases, too, which the backward pass of the stock network does not read."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.SiLU()).eval().requires_grad_(False)
    assert make_lean(net, dict(rounds=False, recompute=True)).recomputed == ['0']
    x = draw(2, 3, 6, 7, dtype=torch.float32)
    names = {n for n, t in net.state_dict().items() if t.is_floating_point()}
    assert {n for n in names if refuses(net, x, n)} == names


class Called(nn.Module):
    """A layer that takes further arguments."""

    def __init__(self, layer, *args):
        super().__init__()
        self.layer, self.args = layer, args

    def forward(self, x):
        return self.layer(x, *self.args)


# Further tensors that lie in between.
INSIDE = {SAM: {'rel_pos_h', 'rel_pos_w'}, EVA02: {'rope.freqs_cos', 'rope.freqs_sin'},
          'mmpretrain.models.utils.swiglu_ffn.SwiGLUFFN': set(),
          'timm.layers.attention.Attention': set(), 'timm.layers.mlp.SwiGLU': set(),
          'timm.layers.mlp.GluMlp': set(), 'mmdet.models.backbones.swin.WindowMSA': set(),
          'mmseg.models.backbones.beit.BEiTAttention': set()}


@pytest.mark.parametrize('path', INSIDE)
def test_hosts_that_are_run_again_refuse_other_weights(path):
    """Of their projections, and what else lies in between."""
    torch.manual_seed(0)
    layer, args, shapes = layer_of(path)
    layer, stock = lean_layer(layer)
    for child in layer.modules():
        if isinstance(child, LeanLayer):
            child.lean.recomputes = True
    x = draw(*shapes[0])
    for name in {n for n in stock.state_dict() if 'index' not in n}:
        if name in INSIDE[path] or refuses(Called(stock, *args), x, f'layer.{name}'):
            assert refuses(Called(layer, *args), x, f'layer.{name}'), name
