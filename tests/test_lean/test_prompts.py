"""Prompt blocks that run again in the backward pass, in each form: hooks, counters, parameters."""
import pytest
import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmprotune.lean.memory import KeptBytes
from tests.test_lean.blocks import OTHERS, forms, gradients, images, of_type, ordinary, prompted

PRELU = dict(type='mmprotune.PromptBlock', act_cfg=dict(type='PReLU'), scale=0.5)


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


# --- blocks of other types --------------------------------------------------------------------


BLOCKS = dict(OneConvolution='output', ActiveDown='output', InPlaceDown='output',
              WideDown='output', GroupedDown='output', PaddedDown='output', NormedDown='output',
              SharedHalves='output', OwnForward=None, HalvesThatAreLayers=None, Drops='output',
              DropsAbove='output', KeepsStatistics=None, InPlaceUp='input', OnlyDown='input')
# Those whose lower half is a convolution, whose gradients are taken as they are.
CONVOLUTIONS = ('OneConvolution', 'WideDown', 'GroupedDown', 'DropsAbove', 'InPlaceUp', 'OnlyDown')


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
