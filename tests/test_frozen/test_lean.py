"""Lean backbones: the same features and gradients as ordinary ones, fewer bytes, and safe use."""
import copy
import io
import logging
import pickle
from collections import namedtuple

import pytest
import torch
from mmcv.cnn.utils import fuse_conv_bn
from mmengine.model import ExponentialMovingAverage, revert_sync_batchnorm
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from mmprotune.errors import FrozenLayerError
from mmprotune.frozen import functional
from mmprotune.frozen.dry_run import tensors_in
from mmprotune.frozen.kept import KeptBytes
from mmprotune.frozen.kernels import run_channels_last
from mmprotune.frozen.lean import make_lean, restore, unfold
from mmprotune.frozen.origin import run_folded
from mmprotune.frozen.twins import Twin
from tests.conftest import RESNET18, autocast, build, wake

MiB = 2**20
SMALL = dict(
    resnet=dict(type='mmdet.ResNet', depth=50, base_channels=16),
    swin=dict(type='mmdet.SwinTransformer', embed_dims=24, depths=(2, 2, 2, 2),
              num_heads=(1, 2, 4, 8), drop_path_rate=0.),
    mmpretrain_swin=dict(type='mmpretrain.SwinTransformer', arch=dict(
        embed_dims=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8]), drop_path_rate=0.,
        pad_small_map=True, out_indices=(0, 1, 2, 3)),
    vit=dict(type='mmseg.VisionTransformer', img_size=(96, 64), patch_size=8, embed_dims=48,
             num_layers=8, num_heads=4, out_indices=(1, 3, 5, 7), drop_path_rate=0.),
    mmpretrain_vit=dict(type='mmpretrain.VisionTransformer', patch_size=8, img_size=(96, 64),
                        out_type='featmap', arch=dict(embed_dims=48, num_layers=4, num_heads=4,
                                                      feedforward_channels=96)),
    convnext=dict(type='mmpretrain.ConvNeXt', out_indices=(0, 1, 2, 3), drop_path_rate=0.,
                  gap_before_final_norm=False,
                  arch=dict(depths=[1, 1, 2, 1], channels=[16, 24, 32, 48])),
    hrnet=dict(type='mmpretrain.HRNet', arch='w18'),
    cspnext=dict(type='mmdet.CSPNeXt', deepen_factor=0.33, widen_factor=0.25),
    pvt=dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=16, num_layers=[1, 1, 1, 1],
             num_heads=[1, 2, 4, 8], drop_path_rate=0.),
    mit=dict(type='mmseg.MixVisionTransformer', embed_dims=16, num_layers=[1, 1, 1, 1],
             drop_path_rate=0.),
    mobilenet=dict(type='mmseg.MobileNetV2', widen_factor=0.5),
    mscan=dict(type='mmseg.MSCAN', embed_dims=[16, 32, 48, 64], depths=[1, 1, 1, 1],
               drop_path_rate=0.),
    regnet=dict(type='mmpretrain.RegNet', arch='regnetx_400mf', out_indices=(0, 1, 2, 3)),
    efficientnet=dict(type='mmpretrain.EfficientNet', arch='b0', out_indices=(2, 3, 4, 5)),
    mobileone=dict(type='mmpretrain.MobileOne', arch='s0', out_indices=(0, 1, 2, 3)),
    bisenet=dict(type='mmseg.BiSeNetV1', spatial_channels=(64, 64, 64, 128),
                 context_channels=(128, 256, 512), backbone_cfg=dict(
                     type='mmseg.ResNetV1c', depth=18, in_channels=3, num_stages=4,
                     out_indices=(0, 1, 2, 3), dilations=(1, 1, 1, 1),
                     strides=(1, 2, 2, 2), norm_cfg=dict(type='BN'))),
    timm=dict(type='mmpretrain.TIMMBackbone', model_name='resnet18', features_only=True,
              pretrained=False),
)


def prompted(backbone=RESNET18, lean=True, **kwargs):
    """A prompted backbone whose prompts and norms are not at their start."""
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                       lean=lean, **kwargs))
    wake(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    model.refresh_fingerprint()
    return model.train()


def ordinary(model):
    """The same model, its layers ordinary again."""
    model = copy.deepcopy(model)
    restore(model)
    assert not any(isinstance(m, Twin) for m in model.modules())
    return model


def outputs_of(model, x):
    return list(tensors_in(model(x)))


def step(model, x):
    """Outputs, and the gradients of prompts and input, of a fixed random loss."""
    x = x.clone().requires_grad_()
    outputs = outputs_of(model, x)
    generator = torch.Generator().manual_seed(2)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum()
               for o in outputs)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss.backward()
    gradients = {'input': x.grad, **{n: p.grad.clone() for n, p in trained.items()}}
    return [o.detach() for o in outputs], gradients


def distance(found, expected):
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, expected))


def images(*shape, dtype=torch.float32, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize('name', SMALL)
def test_same_features_and_gradients(name):
    model = prompted(SMALL[name], lean=dict(fold=False))
    naive = ordinary(model)
    x = images(2, 3, 96, 64)
    (outputs, gradients), (expected, exact) = step(model, x), step(naive, x)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert set(gradients) == set(exact)
    assert distance(gradients.values(), exact.values()) < 1e-5


# PyTorch's own gradient of MSCAN's image is wrong in double precision (torch 2.14, CPU): see below.
@pytest.mark.parametrize('name', sorted(set(SMALL) - {'mscan'}))
def test_same_with_folded_norms_and_everything_recomputed(name):
    """In double precision, where no activation's kink is crossed by rounding."""
    model = prompted(SMALL[name], lean=dict(recompute=True)).double()
    naive = ordinary(model)
    x = images(1, 3, 96, 64, dtype=torch.float64)
    (outputs, gradients), (expected, exact) = step(model, x), step(naive, x)
    assert distance(outputs, expected) < 1e-10
    assert distance(gradients.values(), exact.values()) < 1e-8


def test_mscan_by_finite_differences():
    model = prompted(SMALL['mscan'], lean=dict(recompute=True, prompts='input')).double()
    x, direction = images(1, 3, 96, 64, dtype=torch.float64), images(1, 3, 96, 64, seed=7).double()
    weights = [torch.randn_like(o) for o in outputs_of(model, x)]

    def loss(x):
        return sum((o * w).sum() for o, w in zip(outputs_of(model, x), weights))

    x.requires_grad_()
    found = (torch.autograd.grad(loss(x), x)[0] * direction).sum()
    with torch.no_grad():
        expected = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', ['resnet', 'regnet', 'hrnet', 'cspnext'])
def test_folded_norms_move_outputs_by_rounding_only(name):
    model = prompted(SMALL[name])
    assert model.lean_report.folded and not model.lean_report.remarks
    naive = ordinary(model)
    x = images(2, 3, 96, 64)
    assert distance(outputs_of(model, x), outputs_of(naive, x)) < 1e-5
    model.eval(), naive.eval()
    with torch.no_grad():
        assert distance(outputs_of(model, x), outputs_of(naive, x)) < 1e-5


@pytest.mark.parametrize('name', ['resnet', 'vit', 'swin'])
def test_unfolded_outputs_are_bitwise_the_stock_ones(name):
    model = prompted(SMALL[name])
    naive = ordinary(model)
    x = images(2, 3, 96, 64)
    assert distance(outputs_of(model, x), outputs_of(naive, x)) < 1e-5
    unfold(model)
    for mode in (True, False):
        model.train(mode), naive.train(mode)
        with torch.set_grad_enabled(mode):
            assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, x),
                                                         outputs_of(naive, x), strict=True))


def test_a_strided_batch_is_one_product():
    """Where outputs may differ by rounding; the gradient always."""
    batch = images(6, 5, 4).transpose(0, 1)
    weight, bias = images(7, 4, seed=4), images(7, seed=5)
    for fast in (False, True):
        x = batch.clone().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        assert not x.is_contiguous()
        y = functional.linear(x, weight, bias, fast=fast)
        torch.testing.assert_close(y, torch.nn.functional.linear(batch, weight, bias))
        y.backward(torch.ones(5, 6, 7).transpose(0, 1).contiguous().transpose(0, 1))
        torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 6, 4))


def kept_by(model, x):
    with KeptBytes(model) as kept:
        output = model(x)
    counted = kept.by_module()
    del output
    return counted


# The architectures and the sizes of the promise, (lean / full, lean / naive) at most.
PROMISED = {
    'ResNet-50': (dict(type='mmdet.ResNet', depth=50), 0.25, 0.20),
    'ConvNeXt-T': (dict(type='mmpretrain.ConvNeXt', arch='tiny', out_indices=[0, 1, 2, 3],
                        gap_before_final_norm=False), 0.18, 0.50),
    'Swin-T': (dict(type='mmdet.SwinTransformer', embed_dims=96, depths=(2, 2, 6, 2),
                    num_heads=(3, 6, 12, 24)), 0.23, 0.55),
    'ViT-B': (dict(type='mmseg.VisionTransformer', img_size=(512, 512), embed_dims=768,
                   num_layers=12, num_heads=12, out_indices=(2, 5, 8, 11)), 0.24, 0.40),
}


@pytest.mark.parametrize('name', [
    'ResNet-50', *(pytest.param(n, marks=pytest.mark.slow) for n in PROMISED if n != 'ResNet-50')])
def test_kept_bytes_at_512(name):
    cfg, of_full, of_naive = PROMISED[name]
    x = images(2, 3, 512, 512)
    full = build(cfg)
    full.train()
    full_bytes = sum(kept_by(full, x).values())
    del full
    model = prompted(cfg)
    lean_bytes = sum(kept_by(model, x).values())
    restore(model)
    naive_bytes = sum(kept_by(model, x).values())
    assert lean_bytes <= of_full * full_bytes
    assert lean_bytes <= of_naive * naive_bytes


def test_the_backbone_keeps_bits_and_the_prompts_their_feature():
    """ResNet's own share: one bit for each output of a ReLU after the first prompt."""
    model = prompted(SMALL['resnet'])
    elements = []
    for path, module in model.backbone.named_modules():
        if isinstance(module, nn.ReLU) and path.startswith(('layer2', 'layer3', 'layer4')):
            module.register_forward_hook(lambda m, a, y: elements.append(y.numel()))
    counted = kept_by(model, images(2, 3, 96, 64))
    relu = sum(n for path, n in counted.items() if path.endswith('relu'))
    assert relu == sum(-(-n // 8) for n in elements)
    backbone = sum(n for path, n in counted.items() if path.startswith('backbone'))
    assert backbone - relu < 0.05 * sum(counted.values())


def test_head_only_builds_no_graph():
    model = prompted(prompt=None)
    with KeptBytes(model) as kept:
        outputs = model(images(1, 3, 64, 64))
    assert kept.total() == 0 and not any(o.requires_grad for o in outputs)


def test_lean_false_is_ordinary():
    assert not any(isinstance(m, Twin) for m in prompted(lean=False).modules())


def test_state_dict_fingerprint_and_names_stay():
    torch.manual_seed(0)
    lean, naive = prompted(), prompted(lean=False)
    assert list(lean.state_dict()) == list(naive.state_dict())
    assert torch.equal(lean.frozen_fingerprint, naive.frozen_fingerprint)
    assert [n for n, _ in lean.named_parameters()] == [n for n, _ in naive.named_parameters()]
    assert isinstance(lean.backbone.conv1, nn.Conv2d) and repr(lean) == repr(naive)
    lean.load_state_dict(naive.state_dict())


def test_layers_that_train_stay_ordinary():
    model = prompted(trainable=[r'layer2\..*', r'layer3\.0\.bn1\..*'])
    assert not any(isinstance(m, Twin) for m in model.backbone.layer2.modules()
                   if any(True for _ in m.parameters(recurse=False)))
    assert not isinstance(model.backbone.layer3[0].bn1, Twin)
    assert isinstance(model.backbone.layer3[0].conv1, Twin)
    naive = ordinary(model)
    x = images(2, 3, 64, 64)
    (_, gradients), (_, exact) = step(model, x), step(naive, x)
    assert set(gradients) == set(exact) and any('layer2.0.conv1' in n for n in exact)
    # Folding moves features by rounding, and with them a few masks of ReLU.
    assert distance(gradients.values(), exact.values()) < 1e-3


def formats_of(layer):
    """Notes whether the maps that a layer reads are channels-last."""
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append(
        args[0].is_contiguous(memory_format=torch.channels_last)))
    return seen


@pytest.mark.parametrize('name', ['resnet', 'regnet', 'hrnet', 'cspnext', 'mobilenet', 'timm'])
def test_inference_runs_channels_last(name):
    model = prompted(SMALL[name])
    assert model.lean_report.channels_last and 'channels-last' in str(model.lean_report)
    naive = ordinary(model)
    convs = [m for m in model.backbone.modules()
             if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    inside = formats_of(convs[-1])
    for x in (images(2, 3, 96, 64), images(1, 3, 64, 96)):
        with torch.no_grad():
            found, expected = outputs_of(model, x), outputs_of(naive, x)
        assert distance(found, expected) < 1e-5
        assert all(f.is_contiguous() for f in found)
        inside.pop()
        outputs_of(model, x)  # in a graph
    assert inside == [False, False]


def test_when_maps_stay_as_they_are():
    model = prompted().eval()
    inside = formats_of(model.backbone.layer2[0].conv2)
    x = images(2, 3, 64, 64)
    with torch.inference_mode():
        model(x)
    assert inside.pop() and model.lean_report.channels_last
    with torch.no_grad():
        # Who comes with channels-last images gets channels-last features.
        features = model(x.contiguous(memory_format=torch.channels_last))
        assert inside.pop()
        assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
        with torch.autocast('cpu', torch.bfloat16):
            model(x)
        with FlopCounterMode(display=False):
            model(x)
        torch.jit.trace(model, x, check_trace=False, strict=False)
        model(x[:0]), copy.deepcopy(model).double()(x.double())
    assert inside and not any(inside)
    for other in (prompted(lean=dict(fold=False)), prompted(lean=False), prompted(SMALL['swin']),
                  prompted(SMALL['vit']), prompted(SMALL['convnext'])):
        assert not other.lean_report.channels_last


def test_head_only_training_runs_channels_last():
    model = prompted(prompt=None)
    inside = formats_of(model.backbone.layer2[0].conv2)
    x = images(2, 3, 64, 64)
    assert all(f.is_contiguous() for f in model(x)) and inside.pop()
    model(x.clone().requires_grad_())
    assert not inside.pop()


class Views(nn.Module):
    """Cannot run channels-last: its maps of several images do not lie one after the other."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.stem(x)
        return self.last(y.view(-1, *y.shape[2:]).view(y.shape))


class Reinterprets(Views):
    """Runs channels-last, to another result."""

    def forward(self, x):
        y = self.stem(x)
        return self.last(y * (2 if y.is_contiguous() else 1))


@pytest.mark.parametrize('kind', [Views, Reinterprets])
def test_a_network_that_needs_its_memory_format_keeps_it(kind):
    net = kind().eval()
    for p in net.parameters():
        p.requires_grad_(False)
    naive = copy.deepcopy(net)

    class Root(nn.Module):

        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return run_channels_last(self.net, x)

    root = Root()
    x = images(2, 3, 16, 16)
    assert not make_lean(net, root=root).channels_last
    with torch.no_grad():
        torch.testing.assert_close(root(x), naive(x))


@pytest.mark.parametrize('pack', [
    lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: dict(first=a, second=b),
    namedtuple('Pair', 'first second'), lambda a, b: (a, None, [b, 3])])
def test_outputs_of_any_kind_come_back_contiguous(pack):

    class Net(nn.Module):

        def forward(self, x):
            return pack(x, x.mean((2, 3)))

    net, x = Net(), images(2, 3, 8, 8)
    net.lean_channels_last = True
    with torch.no_grad():
        found, expected = run_channels_last(net, x), net(x)
    assert type(found) is type(expected)
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        torch.testing.assert_close(a, b)
        assert a.is_contiguous()


# --- what it composes with --------------------------------------------------------------------


def test_deepcopy_and_pickle():
    model = prompted()
    x = images(1, 3, 64, 64)
    expected, exact = step(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = dict(copied=copy.deepcopy(model), pickled=pickle.loads(pickle.dumps(model)),
                  saved=torch.load(buffer, weights_only=False))
    for other in copies.values():
        assert sum(isinstance(m, Twin) for m in other.modules()) == sum(
            isinstance(m, Twin) for m in model.modules())
        outputs, gradients = step(other, x)
        assert all(map(torch.equal, outputs, expected))
        assert distance(gradients.values(), exact.values()) == 0
        # Their pairs are their own.
        pair = other.backbone.conv1.lean_pair
        assert pair.norm is other.backbone.bn1 and pair.conv is other.backbone.conv1


def test_ema():
    model = prompted()
    ema = ExponentialMovingAverage(model, momentum=0.5)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        for block in model.prompts.values():
            block.expand.weight.mul_(3)
    ema.update_parameters(model)
    with torch.no_grad():
        for block in model.prompts.values():
            block.expand.weight.mul_(3)
    ema.update_parameters(model)
    assert not torch.equal(ema.module(x)[0], model(x)[0])
    naive = ordinary(ema.module)
    assert distance(ema.module(x), naive(x)) < 1e-5


def test_gradients_accumulate_and_forwards_interleave():
    """Two forwards before one backward, as contrastive losses and two-stage heads do."""
    model = prompted()
    naive = ordinary(model)
    a, b = images(1, 3, 64, 64, seed=1), images(2, 3, 96, 64, seed=2)
    found = []
    for m in (model, naive):
        m.zero_grad()
        first, second = m(a), m(b)
        (sum(t.square().mean() for t in second) + sum(t.sin().mean() for t in first)).backward()
        sum(t.square().mean() for t in m(a)).backward()
        found.append([p.grad for p in m.prompts.parameters()])
    assert distance(*found) < 1e-4


@pytest.mark.parametrize('name', ['resnet', 'swin'])
def test_activation_checkpointing_of_the_host(name):
    cfg = dict(SMALL[name], with_cp=True)
    model = prompted(cfg)
    naive = ordinary(model)
    x = images(1, 3, 64, 64)
    (outputs, gradients), (expected, exact) = step(model, x), step(naive, x)
    assert distance(outputs, expected) < 1e-5
    assert distance(gradients.values(), exact.values()) < 1e-4
    assert sum(kept_by(model, x).values()) <= sum(kept_by(naive, x).values())


@pytest.mark.parametrize('name', ['resnet', 'swin', 'vit'])
def test_compile(name):
    """torch.compile records the ordinary operators; nothing folds, nothing breaks."""
    model = prompted(SMALL[name])
    naive = ordinary(model)
    x = images(1, 3, 96, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager')
    expected = outputs_of(naive, x)
    found = list(tensors_in(compiled(x)))
    assert distance(found, expected) < 1e-5
    sum(t.square().mean() for t in found).backward()
    sum(t.square().mean() for t in expected).backward()
    assert distance([p.grad for p in model.prompts.parameters()],
                    [p.grad for p in naive.prompts.parameters()]) < 1e-4


def test_traced_inference():
    model = prompted().eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        assert distance(traced(x), model(x)) < 1e-5


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['resnet', 'swin', 'vit', 'convnext'])
def test_autocast(name, dtype):
    """As close to the ordinary network as rounding allows, in the same dtypes."""
    if (name, dtype) == ('swin', torch.float16):
        pytest.skip("mmdet's Swin overflows in float16 on noise, lean or not")
    model = prompted(SMALL[name], lean=dict(fold=False))
    naive = ordinary(model)
    x = images(1, 3, 96, 64)
    found = []
    for m in (model, naive):
        m.zero_grad()
        with autocast(dtype):
            outputs = outputs_of(m, x)
        sum(t.float().square().mean() for t in outputs).backward()
        found.append((outputs, [p.grad for p in m.prompts.parameters()]))
    (outputs, gradients), (expected, exact) = found
    assert [o.dtype for o in outputs] == [o.dtype for o in expected]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert distance(outputs, expected) < 1e-2
    assert distance(gradients, exact) < 5e-2


def test_channels_last_is_kept():
    model = prompted().to(memory_format=torch.channels_last)
    x = images(2, 3, 64, 64).to(memory_format=torch.channels_last)
    features = model(x)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
    naive = ordinary(model)
    assert distance(features, naive(x)) < 1e-5
    (_, gradients), (_, exact) = step(model, x), step(naive, x)
    assert distance(gradients.values(), exact.values()) < 1e-3  # masks of ReLU, as below
    assert gradients['input'].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('shape', [(1, 3, 63, 97), (1, 3, 33, 32), (3, 3, 64, 64)])
def test_odd_sizes_and_strided_images(shape):
    model = prompted()
    naive = ordinary(model)
    x = images(*shape[:2], shape[3], shape[2]).transpose(2, 3)
    assert not x.is_contiguous()
    assert distance(model(x), naive(x)) < 1e-5


# --- storage in low precision -----------------------------------------------------------------


@pytest.mark.parametrize('name', ['resnet', 'swin', 'vit', 'convnext'])
def test_weights_stored_in_bfloat16(name):
    model = prompted(SMALL[name], backbone_dtype='bfloat16')
    full = prompted(SMALL[name])
    stored = [p for p in model.backbone.parameters() if p.dtype == torch.bfloat16]
    size = sum(p.numel() for p in model.backbone.parameters())
    assert sum(p.numel() for p in stored) > 0.9 * size
    assert all(p.dtype == torch.float32 for p in model.prompts.parameters())
    x = images(1, 3, 96, 64)
    outputs = outputs_of(model, x)
    assert all(o.dtype == torch.float32 for o in outputs)
    assert 0 < distance(outputs, outputs_of(full, x)) < 0.1
    # Another backbone, as far as checkpoints are concerned.
    assert not torch.equal(model.frozen_fingerprint, full.frozen_fingerprint)
    with torch.autocast('cpu', torch.bfloat16):
        assert all(torch.isfinite(o).all() for o in outputs_of(model, x))
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None for p in model.prompts.parameters())


# --- misuse -----------------------------------------------------------------------------------


THAWED = {
    'resnet': ['layer1.0.conv2.weight', 'layer3.0.bn1.bias', ''],
    'swin': ['stages.1.blocks.1.attn.w_msa.relative_position_bias_table',
             'stages.0.blocks.0.attn.w_msa.qkv.weight', 'stages.2.blocks.0.norm1.weight', ''],
    'vit': ['layers.2.attn.attn.in_proj_weight', 'layers.5.attn.attn.out_proj.bias', ''],
    'convnext': ['norm1.weight', 'downsample_layers.1.0.bias', ''],
    'timm': ['bn1.weight', ''],
}


@pytest.mark.parametrize('name, thawed', [(n, t) for n, ts in THAWED.items() for t in ts])
def test_a_parameter_that_is_thawed_gets_its_gradient(name, thawed):
    """After construction, one or ('') all of them: the layer is an ordinary one then."""
    model = prompted(SMALL[name], lean=dict(recompute=True)).double()
    naive = ordinary(model)
    chosen = []
    for m in (model, naive):
        chosen = [n for n, p in m.backbone.named_parameters() if n.endswith(thawed)]
        for n, p in m.backbone.named_parameters():
            p.requires_grad_(n in chosen)
    assert chosen
    x = images(1, 3, 96, 64, dtype=torch.float64)
    (outputs, gradients), (expected, exact) = step(model, x), step(naive, x)
    assert set(gradients) == set(exact) and {f'backbone.{n}' for n in chosen} <= set(exact)
    assert distance(outputs, expected) < 1e-10
    for n, gradient in exact.items():
        assert (gradients[n] - gradient).norm() <= 1e-8 * gradient.norm().clamp_min(1e-8), n
    with torch.no_grad():
        assert distance(outputs_of(model, x), expected) < 1e-10


@pytest.mark.parametrize('name', ['vit', 'swin', 'resnet'])
def test_a_thawed_layer_whose_weights_are_stored_in_low_precision(name):
    model = prompted(SMALL[name], backbone_dtype='bfloat16')
    stored = {n: p for n, p in model.backbone.named_parameters() if p.dtype == torch.bfloat16}
    for p in stored.values():
        p.requires_grad_()
    _, gradients = step(model, images(1, 3, 96, 64))
    for n, p in stored.items():
        assert gradients[f'backbone.{n}'].dtype == torch.bfloat16
        assert gradients[f'backbone.{n}'].isfinite().all()
        # Not a stand-in's: the layer has its parameters still.
        assert model.backbone.get_parameter(n) is p


@pytest.mark.parametrize('name', ['resnet', 'regnet', 'cspnext', 'mobileone'])
def test_fused_norms(name):
    """mmcv's ``fuse_conv_bn`` puts new convolutions' weights, which require gradients, in place."""
    model = prompted(SMALL[name]).double().eval()
    x = images(1, 3, 96, 64, dtype=torch.float64)
    expected = [o.detach() for o in outputs_of(model, x)]
    fused = fuse_conv_bn(copy.deepcopy(model))
    assert any(p.requires_grad for p in fused.backbone.parameters())
    naive = ordinary(fused)
    (outputs, gradients), (_, exact) = step(fused, x), step(naive, x)
    assert distance(outputs, expected) < 1e-10
    assert set(gradients) == set(exact)
    assert distance(gradients.values(), exact.values()) < 1e-8
    with torch.no_grad():
        assert distance(outputs_of(fused, x), expected) < 1e-10


def test_batch_statistics_are_refused():
    model = prompted()
    model.backbone.layer2[0].bn1.train()
    with pytest.raises(FrozenLayerError, match=r'layer2\.0\.bn1: a lean BatchNorm2d is frozen, .* '
                                               r'in training mode'):
        model(images(1, 3, 64, 64))


def test_norms_that_are_fused_by_pytorch():
    """It puts a copy of the convolution in place."""
    model = prompted().double().eval()
    x = images(1, 3, 64, 64, dtype=torch.float64)
    expected = [o.detach() for o in outputs_of(model, x)]
    fused = copy.deepcopy(model)
    for holder in (fused.backbone, *fused.backbone.layer1):
        for conv, norm in (('conv1', 'bn1'), ('conv2', 'bn2')):
            if hasattr(holder, conv):
                setattr(holder, conv, fuse_conv_bn_eval(getattr(holder, conv),
                                                        getattr(holder, norm)))
                setattr(holder, norm, nn.Identity())
    assert isinstance(fused.backbone.conv1, Twin)
    (outputs, gradients), (_, exact) = step(fused, x), step(model, x)
    assert distance(outputs, expected) < 1e-10
    assert distance(gradients.values(), exact.values()) < 1e-8


def test_a_layer_that_is_copied_alone_is_a_layer_alone():
    model = prompted()
    naive = ordinary(model)
    conv = copy.deepcopy(model.backbone.layer3[0].conv2)
    norm = copy.deepcopy(model.backbone.layer3[0].bn2)
    assert conv.lean_pair is None and model.backbone.layer3[0].conv2.lean_pair is not None
    x = images(1, conv.in_channels, 8, 8)
    assert torch.equal(conv(x), naive.backbone.layer3[0].conv2(x))
    assert torch.equal(norm(x), naive.backbone.layer3[0].bn2(x))
    # In a network that runs it is one, too.
    model.backbone.layer3[0].conv2, model.backbone.layer3[0].bn2 = conv, norm
    images_ = images(1, 3, 64, 64)
    assert distance(outputs_of(model, images_), outputs_of(naive, images_)) < 1e-5


def test_transposed_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
                        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6),
                        nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2)).eval()
    for p in net.parameters():
        p.requires_grad_(False)
    net[1].running_mean.normal_(), net[4].running_mean.normal_()
    naive = copy.deepcopy(net).double()
    report = make_lean(net)
    assert set(report.covered) == set('0123456') and ('3', '4') in report.folded
    net.double()
    x = images(2, 3, 12, 10, dtype=torch.float64)
    (outputs, gradients), (expected, exact) = step(net, x), step(naive, x)
    assert distance(outputs, expected) < 1e-10
    assert distance(gradients.values(), exact.values()) < 1e-10
    folded = run_folded(net, x.requires_grad_())
    assert distance([folded], expected) < 1e-10
    found = torch.autograd.grad(folded.sin().sum(), x)[0]
    assert distance([found], torch.autograd.grad(naive(x).sin().sum(), x)) < 1e-10
    y = naive[2](naive[1](naive[0](x)))
    size = [naive[3](y).size(2) + 1, naive[3](y).size(3)]
    assert torch.equal(net[3](y, size), naive[3](y, size))


class OwnForward(nn.Conv2d):

    def forward(self, x):
        return super().forward(x) * 2


def test_a_convolution_with_its_own_forward_is_left_alone_and_reported():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), OwnForward(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    naive = copy.deepcopy(net)
    for p in (*net.parameters(), *naive.parameters()):
        p.requires_grad_(False)
    report = make_lean(net)
    assert type(net[1]) is OwnForward and isinstance(net[0], Twin)
    assert set(report.ordinary) == {'1'} and report.ordinary['1'] > 0.5 * report.kept
    assert '1 ' in str(report) and 'ordinary modules keep' in str(report)
    x = images(1, 3, 16, 16)
    assert torch.equal(net(x), naive(x))


def test_a_replaced_norm_is_not_applied_twice():
    """MMEngine puts plain norms in place of synchronised ones, and a tool may fuse them."""
    model = prompted(dict(RESNET18, norm_cfg=dict(type='SyncBN')), lean=True)
    x = images(1, 3, 64, 64)
    expected = [o.detach() for o in model.eval()(x)]
    assert model.lean_report.folded
    other = revert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert not isinstance(other.backbone.bn1, Twin)
    assert distance(other(x), expected) < 1e-5


def test_a_hook_on_a_folded_layer_sees_the_stock_network():
    model = prompted().eval()
    naive = ordinary(model)
    seen = []
    for m in (model, naive):
        m.backbone.layer1[0].conv1.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        model(x), naive(x)
    assert distance(seen[:1], seen[1:]) < 1e-5


class Reads(nn.Module):
    """Reads a convolution's output beside its norm, and shares a convolution between two norms."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shared, self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.alone, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        x = self.norm(y) + y
        x = self.a(self.shared(x)) + self.b(self.shared(x))
        return self.last(self.alone(x))


def test_only_a_norm_that_alone_reads_a_convolution_is_folded():
    net = Reads().eval()
    naive = copy.deepcopy(net)
    for p in net.parameters():
        p.requires_grad_(False)
    report = make_lean(net)
    assert report.folded == [('alone', 'last')]
    x = images(1, 3, 16, 16)
    torch.testing.assert_close(net(x), naive(x), rtol=1e-5, atol=1e-5)


class Chooses(nn.Module):
    """Turns a difference by rounding into another output."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.norm.running_var.fill_(0.7)

    def forward(self, x):
        return torch.frac(1e6 * self.norm(self.conv(x)))


def test_a_network_that_rounding_changes_is_not_folded():
    net = Chooses().eval()
    naive = copy.deepcopy(net)
    for p in net.parameters():
        p.requires_grad_(False)
    report = make_lean(net)
    assert not report.folded and not report.channels_last
    assert 'so nothing is folded (as with fold=False)' in report.remarks[0]
    assert isinstance(net.conv, Twin) and not net.conv.lean_fast
    x = images(1, 3, 16, 16)
    assert torch.equal(net(x), naive(x))


def test_a_network_that_runs_at_no_usual_size_is_lean_all_the_same(caplog):

    class Picky(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

        def forward(self, x):
            if x.size(2) != 50:
                raise RuntimeError('wants 50 rows')
            return self.relu(self.conv(x))

    net = Picky()
    for p in net.parameters():
        p.requires_grad_(False)
    report = make_lean(net)
    assert 'ran at no usual image size (RuntimeError: wants 50 rows)' in report.remarks[0]
    assert isinstance(net.conv, Twin)
    assert net(images(1, 3, 50, 8).requires_grad_()).requires_grad


def test_the_report_is_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr('mmprotune.models.prompted_backbone.print_log',
                        lambda text, logger=None, level=logging.INFO: lines.append((level, text)))
    model = prompted()
    model(images(1, 3, 64, 64)), model(images(1, 3, 64, 64))
    assert [level for level, text in lines if text.startswith('lean ResNet: ')] == [logging.INFO]


@pytest.mark.parametrize('name', ['vit', 'convnext', 'swin'])
def test_recomputation_is_a_choice(name):
    x = images(2, 3, 96, 64)
    counts = [sum(kept_by(prompted(SMALL[name], lean=dict(recompute=share)), x).values())
              for share in (0, 0.1, True)]
    assert counts[0] > counts[1] >= counts[2]


def test_attention_may_use_the_fused_kernel_or_stay_as_it_is():
    x = images(1, 3, 96, 64)
    exact, fused, stock = (prompted(SMALL['vit'], lean=dict(attention=a))
                           for a in ('exact', 'sdpa', False))
    assert distance(outputs_of(fused, x), outputs_of(exact, x)) < 1e-5
    assert distance(outputs_of(stock, x), outputs_of(exact, x)) == 0
    assert sum(kept_by(stock, x).values()) > sum(kept_by(exact, x).values())
