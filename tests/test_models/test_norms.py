"""What puts other modules in the place of norms, and prompts behind norms."""
import copy

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from torch import nn

from mmprotune.lean.base import LeanLayer
from tests.conftest import wake
from tests.test_lean.networks import prompted

SYNC = dict(type='mmseg.ResNetV1c', depth=18, base_channels=8, norm_cfg=dict(type='SyncBN'),
            norm_eval=False)


def norms(model):
    return [m for m in model.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def gradients(model):
    model.zero_grad()
    sum(y.sin().sum() for y in model(images())).backward()
    return [p.grad for p in model.prompts.parameters()]


@pytest.fixture
def model():
    return prompted(SYNC, insert='branches')


def test_frozen_norms_do_not_synchronise(model):
    assert len(norms(model)) == 23
    assert not any(isinstance(norm, nn.SyncBatchNorm) for norm in norms(model))
    assert all(isinstance(norm, LeanLayer) for norm in norms(model))


def test_norms_that_train_still_do():
    model = prompted(SYNC, trainable=[r'layer4\..*'])
    of_layer4 = list(model.backbone.layer4.modules())
    for norm in norms(model):
        assert isinstance(norm, nn.SyncBatchNorm) == any(norm is m for m in of_layer4)


def test_one_process(model):
    """What MMEngine's Runner does there takes neither prompts nor lean layers away."""
    expected = gradients(model)
    found = revert_sync_batchnorm(model).train()
    assert all(isinstance(norm, LeanLayer) for norm in norms(found))
    assert all(map(torch.equal, gradients(found), expected)) and all(g.any() for g in expected)


def test_a_runner_that_synchronises_every_norm(model):
    """As with `sync_bn='torch'` in a config: each BatchNorm is replaced once the model is built."""
    names = set(model.state_dict())
    expected, plain = gradients(model), prompted(SYNC, insert='branches', lean=False)
    converted = convert_sync_batchnorm(model, 'torch')
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(converted))
    converted.train()
    assert all(isinstance(norm, LeanLayer) for norm in norms(converted))
    assert all(map(torch.equal, gradients(converted), expected))
    assert set(converted.state_dict()) == names

    convert_sync_batchnorm(plain, 'torch').train()
    assert not any(isinstance(norm, (LeanLayer, nn.SyncBatchNorm)) for norm in norms(plain))


def test_prompts_stay_where_norms_are_fused(model):
    """As by the hosts' `--fuse-conv-bn`: an Identity takes the place of the norm."""
    model.eval()
    with torch.no_grad():
        expected = model(images())
        with model.without_prompts():
            without = model(images())
        found = fuse_conv_bn(copy.deepcopy(model))(images())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm)
                   for m in fuse_conv_bn(copy.deepcopy(model)).backbone.layer1.modules())
    for y, e, w in zip(found, expected, without):
        scale = float(e.abs().max())
        assert float((y - e).abs().max()) < 1e-4 * scale < 1e-2 * float((w - e).abs().max())


def test_a_wrapped_module_keeps_its_prompt(model):
    """Not a second one: as activation checkpointing or sharding wraps what is inside."""
    expected = gradients(model)
    block = model.backbone.layer2[0]
    block.bn2 = nn.Sequential(block.bn2)
    assert all(map(torch.equal, gradients(model), expected))


def test_copies_have_prompts_of_their_own(model):
    other = copy.deepcopy(model)
    wake(other, seed=1)
    assert not all(map(torch.equal, model(images()), other(images())))
    assert all(map(torch.equal, model(images()), model(images())))
    assert len(other._handles) == len(model._handles)


def test_norms_that_are_replaced_after_unwrap_stay_ordinary(model):
    """Nothing is put back then: neither lean layers nor prompts."""
    model.unwrap()
    expected = [y.detach() for y in model.eval()(images())]
    convert_sync_batchnorm(model, 'torch').train()  # frozen ones stop synchronising in any case
    assert not any(isinstance(norm, (LeanLayer, nn.SyncBatchNorm)) for norm in norms(model))
    assert not model.stages and not model._handles
    assert all(map(torch.equal, model(images()), expected))
