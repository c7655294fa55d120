"""What holds for every backbone with every block, as one table.

Each contract first looks for what would make it hold for nothing: prompts that reach no output, a
backbone without frozen tensors, a step that moves nothing.
"""
import copy
import functools

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn

from mmprotune import FrozenSnapshot, FrozenTensorsChanged, PromptedBackbone, audit
from mmprotune.checkpoint import FingerprintMismatch
from mmprotune.lean.convert import restore
from mmprotune.lean.dry_run import tensors_in
from mmprotune.registry import MODELS
from tests.conftest import RESNET18, wake
from tests.test_models.test_insertion import SWIN
from tests.test_models.test_layouts import HRNET, VIT

# Config (with whatever must stand still in it), image size, what else trains.
BACKBONES = dict(
    resnet=(dict(RESNET18, norm_eval=False, zero_init_residual=False), (75, 110),
            r'layer4\.1\.bn2\..*'),
    swin=(dict(SWIN, drop_path_rate=0.5), (75, 110), r'norm3\..*'),
    vit=(dict(VIT, drop_path_rate=0.5, drop_rate=0.5), (80, 112), r'layers\.3\.ln2\..*'),
    convnext=(dict(type='mmpretrain.ConvNeXt', drop_path_rate=0.5, layer_scale_init_value=1.,
                   arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 32, 64]),
                   out_indices=(0, 1, 2, 3), gap_before_final_norm=False), (75, 110), r'norm3\..*'),
    hrnet=(HRNET, (64, 96), r'stage4\.0\.fuse_layers\.0\..*'))
BLOCKS = dict(
    default=dict(type='mmprotune.PromptBlock'),
    figure=dict(type='mmprotune.PromptBlock', reduction=1, act_cfg=None),
    norm=dict(type='mmprotune.PromptBlock', norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU')),
    scale=dict(type='mmprotune.PromptBlock', scale=0.5, groups=1, kernel_size=3),
    mona=dict(type='mmprotune.MonaPrompt', hidden=16),
    conv_adapter=dict(type='mmprotune.ConvAdapterPrompt', reduction=2, act_cfg=dict(type='GELU')),
    adaptformer=dict(type='mmprotune.AdaptFormerPrompt', hidden=16),
    linear_adapter=dict(type='mmprotune.LinearAdapterPrompt'),
    affine=dict(type='mmprotune.AffinePrompt'))


@functools.cache
def stock(name: str, seed: int) -> nn.Module:
    """A backbone of the host with drawn weights and statistics."""
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmdet'):
        net = MODELS.build(copy.deepcopy(BACKBONES[name][0]))
    net.init_weights()
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
    return net


@functools.cache
def built(name: str, block: str, weights: int, seed: int) -> PromptedBackbone:
    net = copy.deepcopy(stock(name, weights))
    torch.manual_seed(seed)
    return PromptedBackbone(net, BLOCKS[block], trainable=[BACKBONES[name][2]])


def prompted(name: str, block: str, weights: int = 0, seed: int = 0) -> PromptedBackbone:
    """A prompted backbone with all defaults: of some frozen weights, and prompts drawn alike."""
    return copy.deepcopy(built(name, block, weights, seed))


def images(name: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, *BACKBONES[name][1], generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    outputs = list(tensors_in(model(x)))
    assert len(outputs) > 2 and all(y.isfinite().all() for y in outputs)
    return outputs


def step(model: PromptedBackbone, x: torch.Tensor) -> None:
    """With everything handed to an optimizer that would move it without a gradient, too."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    # Not the mean square, which a norm leaves as it is.
    generator = torch.Generator().manual_seed(0)
    sum((y * torch.randn(y.shape, generator=generator)).mean() for y in run(model, x)).backward()
    optimizer.step()


def trained(name: str, block: str, **kwargs) -> PromptedBackbone:
    """One step further, with prompts that act."""
    model = prompted(name, block, **kwargs).train()
    wake(model)
    step(model, images(name))
    model.zero_grad()
    return model


def starts_as_the_frozen_backbone(name, block):
    model, x = prompted(name, block).eval(), images(name)
    found = run(model, x)
    with model.without_prompts():
        assert all(map(torch.equal, found, run(model, x)))
    with torch.no_grad():
        host = copy.deepcopy(stock(name, 0))
        host.eval()
        expected = run(host, x)
        for feature, other in zip(found, expected):
            torch.testing.assert_close(feature, other, rtol=1e-3, atol=1e-4)
        assert len(found) == len(expected) and all(y.std() > 0.01 for y in expected)
        wake(model)
        assert all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(run(model, x), expected))


def gradients_reach_what_is_declared(name, block):
    model = prompted(name, block).train()
    wake(model)
    step(model, images(name))
    declared = {n for n, p in model.named_parameters() if p.requires_grad}
    others = {n for n in declared if not n.startswith('prompts.')}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == declared
    assert declared - others == {f'prompts.{n}' for n, _ in model.prompts.named_parameters()}
    names = dict(model.backbone.named_parameters())
    assert 0 < len(others) < len(names) / 2
    assert others == {f'backbone.{n}' for n in names if n not in model.frozen_names}
    for path, prompt in model.prompts.named_parameters():
        assert prompt.grad.any() or path.endswith('bias'), path


def nothing_frozen_moves(name, block):
    model = prompted(name, block).train()
    wake(model)
    snapshot = FrozenSnapshot(model)
    tensors = {n for n, t in model.backbone.state_dict().items()}
    assert len(snapshot.digests) > 0.8 * len(tensors)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    step(model, images(name))
    model.zero_grad()
    audit(model, snapshot, training=True)
    assert all(not torch.equal(p, before[n])
               for n, p in model.named_parameters() if n in before and 'bias' not in n)
    moved = sorted(model.frozen_names)[0]
    with torch.no_grad():
        model.frozen_tensors()[moved].add_(1)
    with pytest.raises(FrozenTensorsChanged, match='frozen tensors moved'):
        audit(model, snapshot)


def a_slim_file_is_the_model(name, block):
    model, twin, x = trained(name, block).eval(), prompted(name, block, seed=1).eval(), images(name)
    state = model.state_dict()
    assert not {f'backbone.{n}' for n in model.frozen_names} & state.keys()
    with torch.no_grad():
        expected = run(model, x)
        assert all(not torch.equal(a, b) for a, b in zip(run(twin, x), expected))
        assert str(twin.load_state_dict(state)) == '<All keys matched successfully>'
        assert all(map(torch.equal, run(twin, x), expected))


def another_backbone_is_refused(name, block):
    state = trained(name, block).state_dict()
    other = prompted(name, block, weights=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(FingerprintMismatch, match='trained on another frozen backbone'):
        other.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())
    assert any(not torch.equal(tensor, state[key]) for key, tensor in before.items()
               if key.startswith('prompts.'))
    prompted(name, block).load_state_dict(state)  # and taken by the right one


def lean_gradients_are_the_ordinary_ones(name, block):
    model = prompted(name, block).double().train()
    wake(model)
    naive, x = copy.deepcopy(model), images(name).double()
    restore(naive)
    # What has no narrow place, or keeps statistics, stays an ordinary block.
    lean = {m.__dict__['lean'].saves for m in model.prompts.values() if 'lean' in m.__dict__}
    assert lean == (set() if block in ('norm', 'affine') else {'output'})
    assert model.lean_report.covered and not any(
        'lean' in m.__dict__ for m in naive.modules() if m is not naive)
    found = []
    for m in (model, naive):
        torch.manual_seed(3)  # of the blocks' dropout
        step(m, x)
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 2 * len(model.prompts)
    largest = max(gradient.norm() for gradient in found[1].values())
    assert largest > 0
    for n, gradient in found[1].items():
        assert (found[0][n] - gradient).norm() <= 1e-8 * gradient.norm() + 1e-13 * largest, n


@pytest.mark.parametrize('contract', [
    starts_as_the_frozen_backbone, gradients_reach_what_is_declared, nothing_frozen_moves,
    a_slim_file_is_the_model, another_backbone_is_refused, lean_gradients_are_the_ordinary_ones],
    ids=lambda c: c.__name__)
@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('name', BACKBONES)
def test_contract(name, block, contract):
    contract(name, block)
