"""Prompts that are added so that the backward pass needs the sum only."""
import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmprotune.errors import FrozenLayerError
from mmprotune.lean.convert import restore
from mmprotune.lean.memory import KeptBytes
from mmprotune.registry import MODELS
from tests.conftest import RESNET18, autocast, build, wake

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
PROMPTS = [dict(type='mmprotune.PromptBlock', **cfg) for cfg in (
    {}, dict(scale=0.5), dict(act_cfg=dict(type='PReLU')),
    dict(norm_cfg=dict(type='GN', num_groups=1)), dict(reduction=1, act_cfg=None))]
# A grouped convolution of 3x3 at the start, dropout, and more than a convolution at the start.
OTHERS = [dict(type='mmprotune.ConvAdapterPrompt', zero_init=False),
          dict(type='mmprotune.AdaptFormerPrompt', dropout=0.3, zero_init=False),
          dict(type='mmprotune.MonaPrompt', dropout=0.3, zero_init=False)]


def prompted(backbone=RESNET18, **kwargs):
    torch.manual_seed(0)
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                       **kwargs))
    wake(model)
    return model.train()


def images(seed=0, dtype=torch.float32):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(4)
    outputs = model(x)
    sum((o.sin() * (i + 1)).sum() for i, o in enumerate(outputs)).backward()
    return ([o.detach() for o in outputs],
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})


def ordinary(model):
    model = copy.deepcopy(model)
    restore(model)
    return model


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


def test_hooks_see_the_prompt():
    """As on an ordinary block; and what the norms note is the same."""
    model = prompted(lean=dict(rounds=False))
    block = model.prompts[model.stages[0].name]
    with model.record_norms() as norms:
        expected = model(images())
    seen = []
    handle = block.register_forward_hook(lambda m, args, prompt: seen.append((args[0], prompt)))
    with model.record_norms() as again:
        found = model(images())
    handle.remove()
    (feature, prompt), = seen
    assert torch.equal(feature + prompt, found[0])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    for name, pair in again.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, norms[name]))
    assert torch.equal(norms[model.stages[0].name][0], prompt.norm())


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


@MODELS.register_module()
class InPlaceStages(nn.Module):
    """Its second stage starts by changing what the first one returned."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1, stride=2))

    def forward(self, x):
        return self.b(self.a(x)),


def test_a_network_that_changes_features_in_place():
    """The prompt there keeps the feature from before."""
    model = prompted(dict(type='mmprotune.InPlaceStages'), stages=['a', 'b'])
    assert [block.lean.saves for block in model.prompts.values()] == ['bottleneck', 'output']
    (_, found), (_, exact) = gradients(model, images()), gradients(ordinary(model), images())
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


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


# --- hooks, counters, other parameters, checkpointing ------------------------------------------

FORMS = [dict(prompts=p, rounds=False) for p in ('output', 'bottleneck', 'input', False)]
forms = pytest.mark.parametrize('lean', FORMS, ids=lambda lean: str(lean['prompts']))
PRELU = dict(type='mmprotune.PromptBlock', act_cfg=dict(type='PReLU'), scale=0.5)


@forms
def test_hooks_of_parameters_run_once(lean):
    model = prompted(prompt=PRELU, lean=lean)
    x = images()
    exact = gradients(model, x)[1]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    seen, accumulated, all_of_them = [], [], []
    for p in trained.values():
        p.register_hook(lambda g: seen.append(1) or g * 0.5)
        p.register_post_accumulate_grad_hook(lambda p: accumulated.append(p))
    multi = register_multi_grad_hook(
        tuple(trained.values()), lambda g: all_of_them.append([t is not None for t in g]))
    found = gradients(model, x)[1]
    multi.remove()
    assert len(seen) == len(accumulated) == len({id(p) for p in accumulated}) == len(trained)
    assert all_of_them == [[True] * len(trained)]
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient * 0.5)


@forms
def test_hooks_of_a_parameter_that_does_not_train_do_not_run(lean):
    model = prompted(prompt=PRELU, lean=lean)
    seen = []
    for block in model.prompts.values():
        for p in (block.act.weight, block.reduce.bias, block.expand.weight):
            p.register_hook(seen.append)
            p.register_post_accumulate_grad_hook(seen.append)
            p.requires_grad_(False)
    found = gradients(model, images())[1]
    assert not seen and len(found) == 5 * len(model.prompts)
    assert all(block.act.weight.grad is None for block in model.prompts.values())


@forms
def test_a_step_whose_operations_are_counted(lean):
    model = prompted(lean=lean)
    x = images()
    exact = gradients(model, x)[1]
    with FlopCounterMode(display=False) as counter:
        found = gradients(model, x)[1]
    assert counter.get_total_flops() > 0
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient)


@forms
@pytest.mark.parametrize('prompt', [PRELU, *OTHERS], ids=lambda cfg: cfg['type'][10:])
def test_parameters_that_are_passed_in(lean, prompt):
    """As ``functional_call`` passes them: the block holds its own again in the backward pass."""
    model = prompted(prompt=prompt, lean=lean).double()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in own.items()}
    torch.manual_seed(1)
    # No leaves: as after a step of an inner loop.
    leaves = {n: torch.randn_like(p).requires_grad_() for n, p in own.items()}
    x = images(dtype=torch.float64)
    found = []
    for m in (model, ordinary(model)):
        given = {n: before[n] + 0.3 * leaf for n, leaf in leaves.items()}
        torch.manual_seed(4)
        outputs = torch.func.functional_call(m, given, (x, ))
        loss = sum(o.sin().sum() for o in outputs)
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for name, a, b in zip(leaves, *found):
        assert b.norm() > 0 and (a - b).norm() <= 1e-9 * b.norm(), name
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in own.items())


@forms
def test_hooks_inside_of_a_block_run_once(lean):
    model = prompted(lean=lean)
    block, seen = model.prompts['stage2'], []
    exact = gradients(model, images())[1]
    block.spatial.register_forward_hook(lambda m, args, y: seen.append(y))
    found = gradients(model, images())[1]
    assert len(seen) == 1
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@forms
def test_a_parameter_that_a_block_uses_twice(lean):
    model = prompted(lean=lean, prompt=dict(type='mmprotune.PromptBlock', reduction=1, groups=1,
                                            kernel_size=1, act_cfg=None)).double()
    for block in model.prompts.values():
        block.expand.weight = block.spatial.weight
    x = images(dtype=torch.float64)
    found, exact = gradients(model, x)[1], gradients(ordinary(model), x)[1]
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        assert (found[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@forms
def test_a_step_in_between_is_refused_in_every_form(lean):
    model = prompted(lean=lean)
    loss = sum(f.sum() for f in model(images()))
    with torch.no_grad():
        model.prompts['stage2'].expand.weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


@pytest.mark.parametrize('reentrant', [True, False])
@forms
def test_a_stage_that_is_run_again_in_the_backward_pass(lean, reentrant):
    """Its prompt too, and another pass in between."""
    model = prompted(lean=lean).double()
    naive = ordinary(model)
    x = images(dtype=torch.float64)

    def run(m, x):
        return checkpoint(lambda x: tuple(m(x)), x, use_reentrant=reentrant)

    found = []
    for m in (model, naive):
        m.zero_grad()
        a, b = (x + i for i in range(2))
        outputs = [*run(m, a.requires_grad_()), *m(b), *run(m, b.requires_grad_())]
        sum((o.sin() * (i + 1)).sum() for i, o in enumerate(outputs)).backward()
        found.append({'a': a.grad, 'b': b.grad, **{
            n: p.grad.clone() for n, p in m.named_parameters() if p.requires_grad}})
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() <= 1e-9 * gradient.norm(), name


@MODELS.register_module()
class CheckpointedInPlace(InPlaceStages):
    """The same, within an activation checkpoint, which hides what is saved."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpointed_network_that_changes_features_in_place():
    model = prompted(dict(type='mmprotune.CheckpointedInPlace'), stages=['a', 'b'])
    assert [block.lean.saves for block in model.prompts.values()] == ['bottleneck', 'output']
    (_, found), (_, exact) = gradients(model, images()), gradients(ordinary(model), images())
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


# --- blocks of other types --------------------------------------------------------------------


class Halves(nn.Module):
    """A block that is cut in two; its lower half is one 1x1 convolution."""

    def __init__(self, channels, zero_init=False):
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 1, bias=False)
        self.last = nn.Conv2d(4, channels, 3, padding=1)

    def down(self, x):
        return self.first(x)

    def up(self, hidden):
        return self.last(hidden.tanh() * hidden)

    def forward(self, x):
        return self.up(self.down(x))


@MODELS.register_module()
class OneConvolution(Halves):
    pass


@MODELS.register_module()
class ActiveDown(Halves):

    def down(self, x):
        return self.first(x).tanh()


@MODELS.register_module()
class InPlaceDown(Halves):

    def down(self, x):
        return self.first(x).tanh_()


@MODELS.register_module()
class WideDown(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Conv2d(channels, 4, 3, padding=1)


@MODELS.register_module()
class GroupedDown(Halves):
    """Stride and dilation, too; the upper half makes up for them."""

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Conv2d(channels, 4, 3, 2, padding=2, dilation=2, groups=4)

    def up(self, hidden):
        return super().up(nn.functional.interpolate(hidden, scale_factor=2))


@MODELS.register_module()
class PaddedDown(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Conv2d(channels, 4, 3, padding=1, padding_mode='reflect')


@MODELS.register_module()
class SharedHalves(Halves):
    """Both use the same bias."""

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))

    def down(self, x):
        return self.first(x).tanh() + self.bias

    def up(self, hidden):
        return super().up(hidden + self.bias * hidden)


@MODELS.register_module()
class NormedDown(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.GroupNorm(2, 4))


@MODELS.register_module()
class OwnForward(Halves):
    """Computes something else than the halves that it inherits."""

    def forward(self, x):
        return super().forward(x) * 3


@MODELS.register_module()
class HalvesThatAreLayers(nn.Module):
    """Has layers of these names, between which it does more."""

    def __init__(self, channels, zero_init=False):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return self.up(self.down(x).sin())


@MODELS.register_module()
class Drops(Halves):

    """In both halves."""

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.drop = nn.Dropout2d(0.3)

    def down(self, x):
        return self.drop(self.first(x))

    def up(self, hidden):
        return self.last(self.drop(hidden.tanh() * hidden))


@MODELS.register_module()
class DropsAbove(Drops):
    """In the upper half; the lower one is a convolution."""

    def down(self, x):
        return self.first(x)


@MODELS.register_module()
class KeepsStatistics(Halves):

    def __init__(self, channels, zero_init=False):
        super().__init__(channels)
        self.first = nn.Sequential(nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4))


BLOCKS = dict(OneConvolution='output', ActiveDown='output', InPlaceDown='output',
              WideDown='output', GroupedDown='output', PaddedDown='output', NormedDown='output',
              SharedHalves='output', OwnForward=None, HalvesThatAreLayers=None, Drops='output',
              DropsAbove='output', KeepsStatistics=None)
# Those whose lower half is a convolution, whose gradients are taken as they are.
CONVOLUTIONS = ('OneConvolution', 'WideDown', 'GroupedDown', 'DropsAbove')


def of_type(name, **kwargs):
    model = prompted(prompt=dict(type=f'mmprotune.{name}'), **kwargs)
    torch.manual_seed(2)
    for p in model.prompts.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double()


@pytest.mark.parametrize('name', BLOCKS)
@pytest.mark.parametrize('last_stage', ['residual', 'serial'])
def test_blocks_of_other_types(name, last_stage):
    model = of_type(name, last_stage=last_stage)
    saves = [getattr(block.__dict__.get('lean'), 'saves', None) for block in model.prompts.values()]
    if last_stage == 'serial' and BLOCKS[name] == 'output':  # whose last prompt is not added
        assert saves.pop() == 'bottleneck'
    assert set(saves) == {BLOCKS[name]}
    if BLOCKS[name] and last_stage == 'residual':
        assert all(bool(b.lean.first) == (name in CONVOLUTIONS) for b in model.prompts.values())
    x = images(dtype=torch.float64)
    (outputs, found), (expected, exact) = gradients(model, x), gradients(ordinary(model), x)
    assert all((a - b).norm() <= 1e-10 * b.norm() for a, b in zip(outputs, expected))
    assert found.keys() == exact.keys()
    for n, gradient in exact.items():
        assert gradient.norm() > 0 and (found[n] - gradient).norm() <= 1e-9 * gradient.norm(), n


def kept_by(model):
    """Bytes kept, by the part of the model that they count for."""
    with KeptBytes(model) as count:
        outputs = model(images(dtype=torch.float64))
    found = count.by_module()
    del outputs
    return (sum(n for path, n in found.items() if path.startswith('prompts')),
            sum(n for path, n in found.items() if not path.startswith('prompts')))


@pytest.mark.parametrize('name', ['OneConvolution', 'ActiveDown', 'NormedDown', 'Drops'])
@pytest.mark.parametrize('prompts', ['output', 'bottleneck'])
def test_blocks_of_other_types_keep_less_and_it_counts_as_theirs(name, prompts):
    model = of_type(name, lean=dict(prompts=prompts))
    (prompts, rest), (of_ordinary, rest_of_ordinary) = kept_by(model), kept_by(
        of_type(name, lean=dict(prompts=False)))
    features = 8 * 2 * sum(block.last.out_channels * (16 // 2**i)**2
                           for i, block in enumerate(model.prompts.values()))
    hidden = 8 * 2 * 4 * sum((16 // 2**i)**2 for i in range(len(model.prompts)))
    assert prompts == features + hidden
    assert prompts < of_ordinary
    assert rest <= rest_of_ordinary


@pytest.mark.parametrize('name', ['Drops', 'DropsAbove'])
@forms
def test_dropout_drops_the_same_again(name, lean):
    """And the backward pass leaves the generator as it was, and the mode of the forward counts."""
    model = of_type(name, lean=lean)
    assert model.prompts['stage1'].drop.training
    x = images(dtype=torch.float64)
    exact = gradients(ordinary(model), x)[1]
    for mode in (True, False):
        model.train().zero_grad()
        torch.manual_seed(4)
        loss = sum((o.sin() * (i + 1)).sum() for i, o in enumerate(model(x)))
        model.train(mode)
        torch.manual_seed(5)  # so that nothing else makes the draws the same
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        for n, p in model.named_parameters():
            if p.requires_grad:
                assert exact[n].norm() > 0 and (p.grad - exact[n]).norm() <= 1e-9 * exact[n].norm()
    torch.manual_seed(6)
    others = [o.detach() for o in model.train()(x)]
    assert not torch.allclose(others[0], model(x)[0])  # it does drop


def test_a_block_without_dropout_touches_no_generator(monkeypatch):
    model = of_type('ActiveDown')
    for name in ('get_rng_state', 'set_rng_state'):
        monkeypatch.setattr(torch, name, lambda *args: pytest.fail('was called'))
    sum(o.sum() for o in model(images(dtype=torch.float64))).backward()


def test_tensors_in_place_of_parameters():
    """As FullyShardedDataParallel has them: views of one flat parameter, no module's."""
    model = prompted()
    x = images()
    _, exact = gradients(model, x)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.prompts.parameters()]))
    views = iter(flat.split([p.numel() for p in model.prompts.parameters()]))
    for module in model.prompts.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.__dict__[name] = next(views).view(parameter.shape)
    sum((o.sin() * (i + 1)).sum() for i, o in enumerate(model(x))).backward()
    expected = torch.cat([g.flatten() for n, g in exact.items() if n.startswith('prompts.')])
    assert (flat.grad - expected).norm() < 1e-4 * expected.norm()
