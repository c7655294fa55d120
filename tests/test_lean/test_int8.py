"""Frozen weights in 8 bits: what layers compute with them, what is kept, and who is told."""
import copy
import pickle

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmpretrain.structures import DataSample
from torch import nn
from torch.nn import functional as F

from mmprotune.errors import FingerprintMismatch, FrozenTensorsChanged
from mmprotune.freezing import FrozenSnapshot, audit, freeze
from mmprotune.lean import make_lean, restore
from mmprotune.lean.convert import store_weights
from mmprotune.lean.graph import TORCH_BEFORE_2_4
from mmprotune.lean.int8 import scale_names, scale_of, weights_in
from mmprotune.lean.memory import KeptBytes
from mmprotune.models.sharing import shared_paths
from mmprotune.models.trunk import Trunk
from mmprotune.registry import MODELS
from tests.classification import classifier_cfg
from tests.conftest import RESNET18
from tests.test_lean.functions import draw
from tests.test_lean.networks import SMALL, distance, images, ordinary, outputs_of, prompted, step

LAYERS = dict(
    conv1d=(lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    conv=(lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 7)),
    pointwise=(lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 9, 7)),
    strided_pointwise=(lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 9, 7)),
    grouped=(lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=2), (2, 4, 9, 7)),
    reflected=(lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode='reflect'), (2, 4, 9, 7)),
    conv3d=(lambda: nn.Conv3d(4, 6, 3, padding=1), (1, 4, 5, 4, 6)),
    transposed=(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 4)),
    grouped_transposed=(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 4)),
    linear=(lambda: nn.Linear(4, 6), (2, 3, 4)))
NETWORKS = dict(
    {name: SMALL[name] for name in ('resnet', 'swin', 'vit', 'mmpretrain_vit', 'convnext', 'pvt')},
    beit=dict(type='mmseg.BEiT', img_size=(96, 64), patch_size=8, embed_dims=48, num_layers=4,
              num_heads=4, out_indices=(0, 1, 2, 3)),
    swin_v2=dict(type='mmpretrain.SwinTransformerV2', window_size=4, img_size=(96, 64),
                 out_indices=(0, 1), pad_small_map=True, arch=dict(
                     embed_dims=24, depths=[2, 2], num_heads=[1, 2],
                     extra_norm_every_n_blocks=0)))


class Holder(nn.Module):
    """A layer that is run on images of any shape, so that a dry run sees it called."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def stored(layer):
    """A frozen layer, lean, in 8 bits; and the ordinary one with the weight that it stands for."""
    torch.manual_seed(0)
    holder = Holder(layer)
    freeze(holder)
    make_lean(holder)
    assert store_weights(holder, 'int8') == []
    exact = copy.deepcopy(holder)
    restore(exact)
    return holder.layer, exact.layer


@pytest.mark.parametrize('name', LAYERS)
def test_gradients_are_those_of_the_weights_it_stands_for(name):
    """Against autograd of the ordinary layer in float64: 1e-12 of the largest value."""
    build, shape = LAYERS[name]
    layer, exact = stored(build())
    assert layer.weight.dtype == torch.int8 and exact.weight.dtype == torch.float32
    assert not scale_names(exact) and 'weight' in exact._parameters
    exact.double()
    x, y = (draw(*shape).requires_grad_() for _ in range(2))
    out, expected = layer(x), exact(y)
    weight = draw(*out.shape, seed=3)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert (out - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (x.grad - y.grad).abs().max() < 1e-12 * y.grad.abs().max()
    with torch.no_grad():
        assert torch.equal(layer(x), out)


@pytest.mark.parametrize('name', LAYERS)
def test_a_scale_for_each_output_channel(name):
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    channels = 1 if getattr(layer, 'transposed', False) else 0
    with torch.no_grad():  # channels of very different sizes, and one of zeros
        sizes = torch.logspace(-3, 1, layer.weight.size(channels))
        shape = [1] * layer.weight.dim()
        shape[channels] = -1
        layer.weight.mul_(sizes.view(shape))
        layer.weight.transpose(0, channels)[0] = 0
    weight = layer.weight.detach().clone()
    layer, exact = stored(layer)
    scale = scale_of(layer)
    assert scale.numel() == weight.size(channels) and scale.dtype == torch.float32
    assert ((exact.weight - weight).abs() <= 0.5001 * scale).all()
    assert layer.weight.abs().amax() == 127 and not exact.weight.transpose(0, channels)[0].any()
    assert layer.bias is None or layer.bias.dtype == torch.float32


@pytest.mark.parametrize('name', NETWORKS)
def test_whole_networks(name):
    model = prompted(NETWORKS[name], backbone_dtype='int8')
    full = prompted(NETWORKS[name])
    low = weights_in(model.backbone)
    assert all(p.is_floating_point() for p in model.parameters())  # hosts take means of them
    weights = {n: p for n, p in full.backbone.named_parameters()
               if p.dim() > 1 and n.rpartition('.')[2].endswith('weight')}
    assert set(weights) <= set(low)
    assert all(p.dtype == torch.float32 for p in model.prompts.parameters())
    exact = ordinary(model)
    x = images(1, 3, 96, 64)
    (outputs, gradients), (expected, of_exact) = step(model, x), step(exact, x)
    assert all(o.dtype == torch.float32 for o in outputs)
    assert distance(outputs, expected) < 1e-5
    assert distance(gradients.values(), of_exact.values()) < 1e-4
    assert 0 < distance(outputs, outputs_of(full, x)) < 0.1
    with torch.autocast('cpu', torch.bfloat16):
        half = outputs_of(model, x)
        assert distance(half, outputs_of(exact, x)) < 0.1
    # Nothing is kept beside what is kept with weights as they are.
    kept = []
    for m in (model, full):
        with KeptBytes(m) as count:
            outputs = outputs_of(m, x)
        kept.append(count.total())
        del outputs
    assert kept[0] == kept[1] > 0


def test_copies_and_pickles():
    model = prompted(SMALL['vit'], backbone_dtype='int8')
    x = images(1, 3, 96, 64)
    expected = outputs_of(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert distance(outputs_of(other, x), expected) == 0
        audit(other)
        # Its load hook is its own, not the first one's.
        other.load_state_dict(ordinary(model).backbone.state_dict())
        assert distance(outputs_of(other, x), expected) < 1e-4


@pytest.mark.skipif(TORCH_BEFORE_2_4, reason='ordinary operators are recorded there')
@pytest.mark.parametrize('backbone', [
    RESNET18, pytest.param(
        dict(SMALL['vit'], num_layers=4, out_indices=(0, 1, 2, 3)), marks=pytest.mark.skipif(
            torch.__version__ < (2, 12), reason='PyTorch up to 2.11 does not compile its attention '
            'in 8 bits: it runs as it is'))], ids=['resnet', 'vit'])
def test_compiled(backbone):
    options = dict(backbone_dtype='int8', compile=dict(backend='aot_eager_decomp_partition'))
    torch._dynamo.reset()
    model = prompted(backbone, **options)
    x = images(1, 3, 96, 64)
    (outputs, gradients), (expected, exact) = step(model, x), step(ordinary(model), x)
    assert not model.compiled.failed
    assert distance(outputs, expected) < 1e-5
    assert distance(gradients.values(), exact.values()) < 1e-4


# --- layers that stay as they are -------------------------------------------------------------


class Reader(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.read = nn.Linear(4, 4)
        self.broken = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.broken(self.conv(x))
        return F.linear(x.movedim(1, -1), self.read.weight)


def test_layers_that_stay_as_they_are_are_named():
    torch.manual_seed(0)
    module = Reader()
    with torch.no_grad():
        module.broken.weight[0] = float('inf')
    freeze(module)
    make_lean(module)
    x = images(1, 3, 16, 16)
    assert store_weights(module, 'int8') == ['read', 'broken']
    assert [p.dtype == torch.int8 for p in (
        module.conv.weight, module.read.weight, module.broken.weight)] == [True, False, False]
    assert scale_names(module) == {'conv.weight_scale'}
    module(x)


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_what_pytorchs_encoder_reads_itself_stays(dtype):
    """Its way of inference calls none of its layers."""

    class Encoder(nn.Module):

        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 8, 8)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, x):
            return self.layer(self.patches(x).flatten(2).transpose(1, 2))

    net = Encoder().eval().requires_grad_(False)
    make_lean(net)
    kept = store_weights(net, dtype)
    assert 'layer.linear1' in kept and 'patches' not in kept
    x = torch.randn(2, 3, 32, 32)
    expected = net(x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected.detach())


def test_a_weight_that_two_layers_have():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[1].weight = module[0].weight
    freeze(module)
    make_lean(module)
    assert store_weights(module, 'int8') == []
    x = draw(2, 8, dtype=torch.float32)
    exact = copy.deepcopy(module)
    restore(exact)
    assert exact[0].weight is exact[1].weight and exact[0].weight.dtype == torch.float32
    assert distance([module(x)], [exact(x)]) < 1e-6


@pytest.mark.parametrize('name', ['vit', 'resnet'])
def test_trunks_share_them(name):
    paths = []
    for dtype in (None, 'int8'):
        first, second = (prompted(SMALL[name], backbone_dtype=dtype).eval() for _ in range(2))
        trunk = Trunk(first)
        trunk.share(second)
        assert trunk.is_shared_by(second)
        paths.append(shared_paths(first.backbone, second.backbone))
    assert paths[0] == paths[1]


# --- frozen means frozen ----------------------------------------------------------------------


@pytest.mark.parametrize('name', ['layer2.0.conv1.weight', 'layer2.0.conv1.weight_scale'])
def test_audit_and_snapshot_look_at_both_tensors(name):
    model = prompted(RESNET18, backbone_dtype='int8')
    assert name in model.frozen_names and f'backbone.{name}' not in model.state_dict()
    audit(model)
    snapshot = FrozenSnapshot(model)
    with torch.no_grad():
        tensor = model.frozen_tensors()[name]
        tensor[0] = -tensor[0]
    assert snapshot.moved(model) == [f'backbone.{name}']
    with pytest.raises(FrozenTensorsChanged, match='are not what they were'):
        audit(model)


def test_an_initialisation_from_outside_leaves_them():
    model = prompted(RESNET18, backbone_dtype='int8')
    model.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Conv2d) else None)
    audit(model)


def test_a_host_trains_a_model_with_it(resnet18_file):
    """MMEngine takes the mean of every parameter when it initialises a model."""
    backbone = dict(type='mmprotune.PromptedBackbone', backbone_dtype='int8', backbone=dict(
        RESNET18, init_cfg=dict(type='Pretrained', checkpoint=resnet18_file)))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(classifier_cfg(backbone))
        model.init_weights()
        snapshot = FrozenSnapshot(model)
        optimizer = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.1)))
        samples = [DataSample().set_gt_label(label) for label in (0, 1)]
        data = dict(inputs=list(images(2, 3, 32, 32)), data_samples=samples)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        for _ in range(2):
            model.train().train_step(data, optimizer)
    audit(model, snapshot, training=True)
    moved = {n for n, p in model.named_parameters() if n in before and not p.equal(before[n])}
    assert {n.rpartition('.')[2] for n in moved} >= {'weight', 'bias'}
    assert any(n.startswith('backbone.prompts.') for n in moved)


def test_unwrapped_it_is_an_ordinary_network():
    model = prompted(RESNET18, backbone_dtype='int8')
    x = images(1, 3, 96, 64)
    with torch.no_grad(), model.without_prompts():
        expected = outputs_of(model, x)
    backbone = model.unwrap()
    assert all(t.is_floating_point() for t in backbone.parameters())
    assert set(backbone.state_dict()) == set(prompted(RESNET18).backbone.state_dict())
    with torch.no_grad():
        assert distance(backbone(x), expected) < 1e-5
    assert model.frozen_names <= set(backbone.state_dict())
    audit(model)


# --- checkpoints ------------------------------------------------------------------------------


def test_slim_files_are_of_one_precision():
    models = {dtype: prompted(RESNET18, backbone_dtype=dtype)
              for dtype in (None, 'bfloat16', 'int8')}
    assert len({bytes(m.frozen_fingerprint.tolist()) for m in models.values()}) == 3
    for dtype, model in models.items():
        for other, target in models.items():
            if dtype == other:
                target.load_state_dict(model.state_dict())
            elif 'int8' in (dtype, other):
                with pytest.raises(FingerprintMismatch, match='another frozen backbone'):
                    target.load_state_dict(model.state_dict())
