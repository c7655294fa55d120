"""Prompted backbones that torch.compile compiles."""
import copy
import pickle

import pytest
import torch
from torch import nn

from mmprotune.lean.graph import TORCH_BEFORE_2_4, FrozenLayerError
from mmprotune.lean.memory import KeptBytes
from mmprotune.models.compiling import Compiled
from tests.test_lean.networks import SMALL, distance, images, outputs_of, prompted, step

# Two blocks between two prompts: compiling takes seconds, not minutes.
TINY = dict(type='mmdet.ResNet', depth=18, base_channels=8, num_stages=1, strides=(1, ),
            dilations=(1, ), out_indices=(0, ))
# AOTAutograd with the partitioner that inductor uses too, and nothing that takes a C++ compiler.
BACKEND = 'aot_eager_decomp_partition'
compiles = pytest.mark.skipif(
    TORCH_BEFORE_2_4, reason='PyTorch 2.1 compiles no network with prompts, which runs as it is')


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def small(**kwargs):
    return prompted(TINY, stem=True, **kwargs)


def counted(backend='eager'):
    """A backend, and the list of what it has compiled."""
    graphs = []

    def compile_(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return compile_, graphs


def kept(model, x):
    with KeptBytes(model, by_module=False) as count:
        outputs = model(x)
    total = count.total()
    del outputs
    return total


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith('compile: ')]


@pytest.fixture
def log(caplog):
    from mmengine.logging import MMLogger
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(('value', 'error', 'message'), [
    ('inductor', TypeError, 'compile must be True, False or a dict'),
    (dict(backends='inductor'), ValueError, "compile has no option 'backends'"),
    (dict(backend=3), TypeError, 'compile.backend must be'),
    (dict(dynamic='yes'), TypeError, 'compile.dynamic must be True, False or None'),
    (dict(fullgraph=1), TypeError, 'compile.fullgraph must be'),
    (dict(mode=True), TypeError, 'compile.mode must be'),
    (dict(options=['a']), TypeError, 'compile.options must be'),
    (dict(mode='default', options=dict()), ValueError, 'compile.mode'),
    (dict(activation_memory_budget='half'), TypeError, 'compile.activation_memory_budget'),
    (dict(backend='nonsense'), ValueError, "compile.backend='nonsense': torch.compile refuses"),
    (dict(mode='nonsense'), ValueError, "compile.mode='nonsense': torch.compile refuses"),
    (dict(options=dict(nonsense=1)), ValueError, "compile.options={'nonsense': 1}: torch.compile"),
    (dict(activation_memory_budget=1.5), ValueError, 'expected 0 to 1, got 1.5'),
])
def test_wrong_values_name_the_key(value, error, message):
    with pytest.raises(error) as raised:
        small(compile=value)
    assert message in str(raised.value)


@compiles
def test_outputs_and_gradients_are_those_of_the_network_as_it_is():
    """In float64, against autograd of the ordinary layers: 1e-11 of their norm. Lean layers keep
    two thirds of what ordinary ones do, compiled alike."""
    exact = small(lean=False).double()
    x = images(2, 3, 64, 64, dtype=torch.float64)
    expected, wanted = step(exact, x)
    found = {}
    for lean in (True, False):
        backend, graphs = counted(BACKEND)
        model = small(lean=lean, compile=dict(backend=backend)).double()
        outputs, gradients = step(model, x)
        assert distance(outputs, expected) < 1e-11
        assert gradients.keys() == wanted.keys()
        assert distance(gradients.values(), wanted.values()) < 1e-11
        found[lean] = kept(model, x.clone().requires_grad_())
        assert len(graphs) == 1 and not model.compiled.failed
    assert found[True] <= 0.67 * found[False]


def test_the_memory_budget_is_set_while_it_compiles():
    from torch._functorch import config
    if not hasattr(config, 'activation_memory_budget'):
        with pytest.raises(ValueError, match='compile.activation_memory_budget=0.5 needs a newer'):
            small(compile=dict(activation_memory_budget=0.5))
        return
    seen = []

    def backend(graph, inputs):
        seen.append(config.activation_memory_budget)
        return graph

    with torch.no_grad():
        small(compile=dict(backend=backend, activation_memory_budget=0.5))(images(1, 3, 64, 64))
    assert seen == [0.5] and config.activation_memory_budget == 1


@pytest.mark.parametrize(('value', 'expected'), [
    (True, dict(layout_optimization=False)),
    (dict(options=dict(max_autotune=True)), dict(layout_optimization=False, max_autotune=True)),
    (dict(options=dict(layout_optimization=True)), dict(layout_optimization=True)),
    (dict(mode='max-autotune-no-cudagraphs'), None),
    (dict(backend='eager'), None),
])
def test_weights_are_not_copied_channels_last(value, expected, monkeypatch):
    given = []
    monkeypatch.setattr(torch, 'compile', lambda function, **kwargs: given.append(kwargs))
    Compiled(value)._compile()
    assert given[0].get('options') == expected
    assert given[0]['fullgraph'] is True and 'activation_memory_budget' not in given[0]


def test_state_and_identity_do_not_know():
    plain, model = small(), small(compile=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.own_fingerprint == plain.own_fingerprint
    plain.load_state_dict(model.state_dict())
    assert {n for n, _ in model.named_modules()} == {n for n, _ in plain.named_modules()}


@compiles
def test_copies_compile_for_themselves():
    backend, graphs = counted()
    model = small(compile=dict(backend=backend)).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = outputs_of(model, x)
        other = copy.deepcopy(model)
        for parameter in other.prompts.parameters():
            parameter.zero_()
        assert distance(outputs_of(other, x), expected) > 0.01
        assert distance(outputs_of(model, x), expected) == 0
    assert len(graphs) in (1, 2)  # one, with other weights, where PyTorch shares it
    model.compiled.options['backend'] = BACKEND  # a function of a test cannot be pickled
    again = pickle.loads(pickle.dumps(model))
    assert again.compiled.options == dict(backend=BACKEND)
    assert again.compiled is not model.compiled


@compiles
def test_many_sizes_cost_few_graphs():
    backend, graphs = counted()
    model = small(compile=dict(backend=backend)).eval()
    with torch.no_grad():
        for i in range(12):
            model(images(1, 3, 64 + 32 * (i % 5), 64 + 32 * (i * 7 % 11)))
    assert not model.compiled.failed
    assert len(graphs) <= 3


def test_what_cannot_be_compiled_runs_as_it_is(log):
    def broken(graph, inputs):
        raise RuntimeError('no such compiler\nand more')

    model = small(compile=dict(backend=broken))
    plain = small()
    for _ in range(2):
        x = images(1, 3, 64, 64)
        outputs, gradients = step(model, x)
        expected, wanted = step(plain, x)
        assert distance(outputs, expected) == 0
        assert distance(gradients.values(), wanted.values()) == 0
    assert model.compiled.failed
    message, = said(log)
    assert 'ResNet cannot be compiled' in message
    assert 'no such compiler' in message or TORCH_BEFORE_2_4  # which names a line of its own
    assert '\n' not in message


@compiles
def test_rates_that_are_numpys_numbers():
    """Of mmpretrain's drop path: the compiler would not branch by them."""
    model = prompted(dict(
        type='mmpretrain.VisionTransformer', img_size=32, patch_size=16, out_type='featmap',
        drop_path_rate=0.1, arch=dict(embed_dims=8, num_layers=2, num_heads=2,
                                      feedforward_channels=16)), compile=dict(backend='eager'))
    outputs_of(model, images(1, 3, 32, 32))
    assert not model.compiled.failed


@compiles
def test_a_size_too_many_runs_as_it_is(log):
    backend, graphs = counted()
    model = small(compile=dict(backend=backend, dynamic=False)).eval()
    plain = small().eval()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for size in (64, 96, 128, 160):
            x = images(1, 3, 64, size)
            assert distance(outputs_of(model, x), outputs_of(plain, x)) < 1e-5
        count = len(graphs)
        model(images(1, 3, 64, 64))
    assert count == len(graphs) == 2 and not model.compiled.failed
    message, = said(log)
    assert '(1, 3, 64, 128)' in message


def test_where_there_is_no_compiler_it_runs_as_it_is(log, monkeypatch):
    def compile_(*args, **kwargs):
        raise RuntimeError('not on this Python')

    model = small(compile=True)
    monkeypatch.setattr(torch, 'compile', compile_)
    with torch.no_grad():
        model(images(1, 3, 64, 64))
    message, = said(log)
    assert 'not on this Python' in message


@compiles
def test_an_error_of_the_network_is_its_own(log):
    model = small(compile=dict(backend='eager'))
    norm = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    norm.train()
    with pytest.raises(FrozenLayerError, match='training mode'):
        model(images(1, 3, 64, 64))
    norm.eval()
    model(images(1, 3, 64, 64))
    assert not model.compiled.failed and not said(log)


@compiles
def test_calls_that_look_at_prompts_run_as_they_are():
    backend, graphs = counted()
    model = small(compile=dict(backend=backend)).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        with model.record_norms() as norms:
            model(x)
        assert set(norms) == set(model.prompts)
        with model.without_prompts():
            plain = outputs_of(model, x)
        assert not graphs
        assert distance(outputs_of(model, x), plain) > 0.01
    assert len(graphs) == 1


@compiles
@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet', 'swin', 'vit', 'convnext'])
def test_networks(name):
    """In float64, against autograd of the ordinary layers: 1e-11 of their norm."""
    model = prompted(SMALL[name], compile=dict(backend=BACKEND)).double()
    exact = prompted(SMALL[name], lean=False).double()
    x = images(1, 3, 96, 64, dtype=torch.float64)
    (outputs, gradients), (expected, wanted) = step(model, x), step(exact, x)
    assert not model.compiled.failed
    assert distance(outputs, expected) < 1e-11
    assert distance(gradients.values(), wanted.values()) < 1e-11


@pytest.mark.slow
@compiles
def test_inductor():
    model, plain = small(compile=True), small()
    x = images(2, 3, 64, 64)
    (outputs, gradients), (expected, wanted) = step(model, x), step(plain, x)
    assert not model.compiled.failed
    assert distance(outputs, expected) < 1e-5
    assert distance(gradients.values(), wanted.values()) < 1e-3
