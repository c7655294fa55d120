"""Nothing of one call lives on the module."""
import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmprotune.models import calls
from tests.conftest import RESNET18, wake
from tests.test_models.test_layouts import VIT, prompted

# As many tokens, other grids.
SIZES = [(64, 96), (96, 64), (32, 192), (192, 32)]


def vit(**options):
    model = prompted(dict(VIT, **options))
    wake(model)
    return model


def test_threads_see_their_own_images():
    model = vit()
    images = [torch.randn(1, 3, *size) for size in SIZES]
    with torch.no_grad():
        expected = [model(x) for x in images]
        assert not torch.equal(*(e[0].flatten()[:8] for e in expected[:2]))

    def infer(i):
        with torch.no_grad():
            return model(images[i % 4])

    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(infer, range(80))):
            for a, b in zip(found, expected[i % 4]):
                torch.testing.assert_close(a, b)


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.prompts.parameters()]
    model.zero_grad()
    return found


def loss(outputs) -> torch.Tensor:
    return sum(t.square().mean() for t in outputs)


class Again(nn.Module):
    """Runs a layer, its prompt included, once more in the backward pass, as timm's models do."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize('checkpointing', ['none', 'host', 'reentrant', 'other'])
@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
def test_several_forwards_before_one_backward(checkpointing):
    model = vit(with_cp=checkpointing == 'host').train()
    if checkpointing in ('reentrant', 'other'):
        layers = model.backbone.layers
        for i in range(1, len(layers)):
            layers[i] = Again(layers[i], checkpointing == 'reentrant')
    images = [torch.randn(2, 3, *size) for size in SIZES[:2]]
    for x in images:
        loss(model(x)).backward()
    expected = gradients(model)
    both = loss(model(images[0])) + loss(model(images[1]))
    if checkpointing in ('reentrant', 'other'):  # nothing tells for which of the two
        with pytest.raises(ValueError, match=r'any of \[\(4, 6\), \(6, 4\)\].*with_cp=False'):
            both.backward()
        return
    both.backward()
    for a, b in zip(gradients(model), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
@pytest.mark.parametrize('reentrant', [False, True])
def test_the_whole_backbone_run_again(reentrant):
    model = vit().train()
    images = [torch.randn(2, 3, *size).requires_grad_() for size in SIZES[:2]]
    for x in images:
        loss(model(x)).backward()
    expected = gradients(model)
    sum(loss(checkpoint(model, x, use_reentrant=reentrant)) for x in images).backward()
    for a, b in zip(gradients(model), expected):
        torch.testing.assert_close(a, b)


def test_calls_are_forgotten_with_their_graphs():
    model = vit(with_cp=True)
    outputs = model(torch.randn(1, 3, 64, 96).requires_grad_())
    assert calls.images(model) == [(64, 96)]
    del outputs
    gc.collect()
    assert calls.images(model) == []
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 96))
    assert calls.images(model) == []


def test_the_backbone_called_past_the_wrapper_does_not_guess():
    with pytest.raises(ValueError, match='fit no grid .* on images of unknown size'), \
            torch.no_grad():
        vit().backbone(torch.randn(1, 3, 64, 96))


def test_norms_are_noted_by_the_thread_that_asked():
    model = prompted(RESNET18)
    wake(model)
    x = torch.randn(1, 3, 64, 64)
    with model.record_norms() as norms, ThreadPoolExecutor(1) as pool:
        pool.submit(model, 100 * x).result()
        assert not norms
        model(x)
    assert set(norms) == {'stage1', 'stage2', 'stage3', 'stage4'}
    with model.record_norms() as again:
        model(x)
    assert norms == again


# --- without prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize('backbone', [RESNET18, VIT], ids=lambda cfg: cfg['type'])
def test_without_prompts(backbone):
    """The stock backbone, for whoever calls: the wrapper, or the backbone past it."""
    model = prompted(backbone, lean=dict(rounds=False))
    wake(model)
    stock, x = copy.deepcopy(model).unwrap(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before, expected = model(x), stock(x)
        assert not torch.equal(before[0], expected[0])
        with model.without_prompts():
            for call in (model, model.backbone):
                assert all(map(torch.equal, call(x), expected))
            with model.record_norms() as norms:
                assert all(map(torch.equal, model(x), expected))
            assert not norms
        with pytest.raises(AttributeError), model.without_prompts():
            model(None)
        assert all(map(torch.equal, model(x), before))
        with model.record_norms() as norms, model.without_prompts():
            assert all(map(torch.equal, model(x), expected))
        assert not norms


def test_without_prompts_concerns_one_thread_and_one_backbone():
    model, other = vit(), vit()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        with model.without_prompts(), ThreadPoolExecutor(1) as pool:
            assert not torch.equal(model(x)[0], expected[0])
            assert torch.equal(other(x)[0], expected[0])

            def elsewhere():
                with torch.no_grad():
                    return model(x)

            assert torch.equal(pool.submit(elsewhere).result()[0], expected[0])


@pytest.mark.parametrize('layers', ['own', 'others'])
@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
def test_layers_run_again_for_a_pass_without_prompts_have_none(layers):
    """The backward pass comes when nothing is open any more."""
    model = vit(with_cp=layers == 'own').train()
    x = torch.randn(2, 3, 64, 96).requires_grad_()
    loss(copy.deepcopy(model).unwrap()(x)).backward()
    expected, x.grad = x.grad, None
    if layers == 'others':
        for i, layer in enumerate(model.backbone.layers):
            model.backbone.layers[i] = Again(layer, reentrant=False)
    with model.without_prompts():
        found = loss(model(x))
    found.backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in model.prompts.parameters())
    with model.without_prompts():
        both = loss(model(x))
    both = both + loss(model(x))
    if layers == 'others':  # nothing tells for which of the two
        with pytest.raises(ValueError, match='graphs with prompts and without are alive'):
            both.backward()


@pytest.mark.skipif(not hasattr(torch, 'export') or torch.__version__ < '2.6',
                    reason='torch.export needs torch 2.6')
def test_an_exported_model_knows_its_images():
    """Exporting runs modules through stand-ins, which are other objects."""
    model = prompted(dict(type='mmseg.MixVisionTransformer', embed_dims=8, num_layers=[1, 1, 1, 1],
                          num_heads=[1, 1, 2, 2]), insert='branches', lean=False).eval()
    wake(model)
    net, x = nn.Sequential(model, nn.Identity()), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(net, (x, ), strict=False).module()
        for expected, found in zip(net(x), program(x)):
            torch.testing.assert_close(found, expected)


def test_finding_ones_own_call_reads_no_attributes():
    """The compiler of PyTorch 2.10 cannot read a module's ``__dict__``."""
    class Owner:
        __slots__ = ('__weakref__', )

    owner, call = Owner(), calls.Call((32, 32))
    with calls.opened(owner, call):
        assert calls.current(owner) is call
    assert calls.current(owner) is None
