"""Prompts that are added so that the backward pass needs the sum only."""
import pytest
import torch
from torch import nn

from mmprotune.errors import FrozenLayerError
from mmprotune.lean.memory import KeptBytes
from tests.conftest import RESNET18, autocast
from tests.test_lean.blocks import OTHERS, PROMPTS, gradients, images, ordinary, prompted

SWIN = dict(type='mmdet.SwinTransformer', embed_dims=24, depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8), drop_path_rate=0.)
# Stages as maps (N, C, H, W), as (N, H, W, C), as tokens, and as tokens behind a class token.
LAYOUTS = dict(
    nchw=RESNET18,
    nhwc=dict(type='mmpretrain.TIMMBackbone', model_name='swin_tiny_patch4_window7_224',
              features_only=True, pretrained=False, img_size=64, embed_dim=24,
              drop_path_rate=0.),
    tokens=SWIN,
    class_token=dict(type='mmpretrain.VisionTransformer', patch_size=8, img_size=64,
                     out_type='featmap', arch=dict(embed_dims=48, num_layers=4, num_heads=4,
                                                   feedforward_channels=96)))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('prompt', PROMPTS + OTHERS, ids=lambda cfg: cfg['type'][10:] + ''.join(
    f'-{key}' for key in [*cfg][1:]))
def test_same_gradients(layout, prompt):
    """In double precision: what is left is the rounding of the sum."""
    if layout == 'nhwc':
        pytest.importorskip('timm')
    model = prompted(LAYOUTS[layout], prompt=prompt).double()
    kind = model.stages[0].layout.kind.lower()
    assert kind == (layout if layout in ('nchw', 'nhwc') else 'nlc')
    assert all(block.lean.saves == 'output' for block in model.prompts.values())
    x = images(dtype=torch.float64)
    (outputs, found), (expected, exact) = gradients(model, x), gradients(ordinary(model), x)
    assert len(outputs) == len(expected)
    assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(outputs, expected))
    assert found.keys() == exact.keys() and len(found) >= 4 * len(model.prompts)
    for name, gradient in exact.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@pytest.mark.parametrize('prompt', [PROMPTS[0], *OTHERS], ids=lambda cfg: cfg['type'][10:])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast(dtype, prompt):
    """Under autocast the rounding of the sum is one more of its many."""
    model = prompted(LAYOUTS['nchw'], prompt=prompt, lean=dict(rounds=False))
    naive = ordinary(model)
    x = images()
    exact = gradients(naive, x)[1]
    with autocast(dtype):
        found, low = gradients(model, x)[1], gradients(naive, x)[1]
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        error, usual = ((g[name] - gradient).norm() / gradient.norm() for g in (found, low))
        assert error <= 2 * usual + 1e-3, (name, error, usual)


def test_what_reads_the_feature_keeps_it_too():
    """A trainable convolution on each output, as a neck has it, adds next to nothing."""
    model = prompted()
    neck = nn.ModuleList(nn.Conv2d(block.channels, 4, 1) for block in model.prompts.values())
    kept = {}
    for prompts in ('output', 'bottleneck'):
        model = prompted(lean=dict(prompts=prompts))
        with KeptBytes(nn.ModuleList([model, neck])) as count:
            features = model(images())
            held = [conv(f) for conv, f in zip(neck, features)]
        kept[prompts] = count.total()
        size = sum(f.nbytes for f in features)
        del held
    assert kept['bottleneck'] - kept['output'] == size
    assert kept['output'] < 1.4 * size


def test_blocks_that_train_in_part():
    """Nothing is computed for a parameter that does not train, and it gets no gradient."""
    model = prompted()
    for block in model.prompts.values():
        block.reduce.weight.requires_grad_(False)
        block.spatial.bias.requires_grad_(False)
    (_, found), (_, exact) = gradients(model, images()), gradients(ordinary(model), images())
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert model.prompts['stage1'].reduce.weight.grad is None


def test_inference_is_the_same_in_its_own_memory():
    model = prompted(lean=dict(rounds=False))
    naive = ordinary(model)
    x = images()
    with torch.no_grad():
        found, expected = model(x), naive(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(a.stride() == b.stride() for a, b in zip(found, expected))


# --- features that are changed in place -------------------------------------------------------


@pytest.mark.parametrize('name', ['InPlaceStages', 'CheckpointedInPlace'])
def test_a_network_that_changes_features_in_place(name):
    """The prompt there keeps the feature from before."""
    model = prompted(dict(type=f'mmprotune.{name}'), stages=['a', 'b'])
    assert [block.lean.saves for block in model.prompts.values()] == ['bottleneck', 'output']
    (_, found), (_, exact) = gradients(model, images()), gradients(ordinary(model), images())
    for parameter, gradient in exact.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_a_head_that_changes_features_in_place_is_told_what_to_set():
    for prompts in ('output', 'bottleneck'):
        model = prompted(lean=dict(prompts=prompts))
        loss = sum(f.relu_().sum() for f in model(images()))
        if prompts == 'output':
            with pytest.raises(FrozenLayerError,
                               match=r"model\.backbone\.lean=dict\(prompts='bottleneck'\)"):
                loss.backward()
        else:
            loss.backward()


def test_a_step_between_forward_and_backward_is_refused():
    model = prompted()
    loss = sum(f.sum() for f in model(images()))
    with torch.no_grad():
        model.prompts['stage2'].expand.weight.add_(1)
    with pytest.raises(FrozenLayerError, match='or a parameter of its prompt block'):
        loss.backward()
