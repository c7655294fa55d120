"""What torch.compile keeps for the backward pass of lean layers, and what it computes."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmprotune.freezing import freeze
from mmprotune.lean import graph, make_lean
from mmprotune.lean.base import LeanLayer
from mmprotune.lean.graph import TORCH_BEFORE_2_4, is_compiled
from mmprotune.lean.memory import KeptBytes
from tests.test_lean.functions import draw

pytestmark = pytest.mark.skipif(TORCH_BEFORE_2_4, reason='ordinary operators are recorded there')
# AOTAutograd with the partitioner that inductor uses too, and nothing that takes a C++ compiler.
BACKEND = 'aot_eager_decomp_partition'
SHAPES = {1: (2, 4, 9), 2: (2, 4, 9, 7), 3: (1, 4, 5, 4, 6)}


class Layers(nn.Module):
    """Each layer on an input of its own."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs):
        return [layer(x) for layer, x in zip(self.layers, inputs)]


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, backend=BACKEND, fullgraph=True)


def lean(module):
    freeze(module.eval())
    make_lean(module)
    assert any(isinstance(m, LeanLayer) for m in module.modules())
    return module


def gradients(module, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = module(*inputs)
    loss = sum((y * draw(*y.shape, dtype=y.dtype, seed=5)).sum() for y in outputs)
    return [y.detach() for y in outputs], torch.autograd.grad(loss, inputs)


def kept(module, *inputs):
    module = compiled(module)
    inputs = [x.clone().requires_grad_() for x in inputs]
    module(*inputs)  # is compiled
    with KeptBytes(module, by_module=False) as count:
        outputs = module(*inputs)
    total = count.total()
    del outputs
    return total


def test_convolutions_of_every_kind():
    """Against autograd of the ordinary layers in float64: 1e-12 of the largest value."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1, stride=2, bias=False),
        nn.Conv2d(4, 8, 3, stride=2, dilation=2, groups=2), nn.Conv2d(4, 4, 5, groups=4),
        nn.Conv2d(4, 6, (2, 4), padding='same'),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode='reflect'),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.Conv1d(4, 6, 3, stride=2), nn.Conv3d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3)]
    ordinary = Layers(*layers).double()
    inputs = [draw(*SHAPES[2 if m.weight.dim() == 4 else m.weight.dim() - 2]) for m in layers]
    inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    inputs[-1] = inputs[-1][0]  # no batch
    for parameter in ordinary.parameters():
        parameter.requires_grad_(False)
    expected = gradients(copy.deepcopy(ordinary), inputs)
    found = gradients(compiled(lean(ordinary)), inputs)
    for values, exact in zip(found, expected):
        for a, b in zip(values, exact):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def test_a_chain_keeps_its_masks_only():
    x = draw(1, 4, 16, 16, dtype=torch.float32)
    masks = 2 * 8 * x[0, 0].numel()
    constants = 64 * 8  # statistics of the norms, should the compiler keep some
    found = kept(lean(chain()), x)
    assert masks <= found <= masks + constants
    # Ordinary layers: the input of two convolutions, of which masks can be computed.
    stock = chain()
    freeze(stock)
    assert kept(stock, x) >= 2 * 8 * x[0, 0].nbytes


def test_a_parameter_that_is_thawed_gets_its_gradient():
    model = lean(chain()).double()
    model[3].weight.requires_grad_()
    x = draw(1, 4, 8, 8)
    found = torch.autograd.grad(compiled(model)(x).square().sum(), model[3].weight)[0]
    exact = torch.autograd.grad(model(x).square().sum(), model[3].weight)[0]
    assert (found - exact).abs().max() <= 1e-12 * exact.abs().max()


def test_an_export_holds_the_operators():
    model = lean(chain())
    x = draw(1, 4, 8, 8, dtype=torch.float32)
    program = torch.export.export(model, (x, ))
    targets = {str(node.target) for node in program.graph.nodes if node.op == 'call_function'}
    assert 'aten.conv2d.default' in targets and not any('autograd' in t for t in targets)
    assert math.isclose(float(program.module()(x).sum()), float(model(x).sum()), rel_tol=1e-4)


class Asks(nn.Module):

    def forward(self, x):
        return x + is_compiled()


def test_what_is_compiled_is_not_taken_for_exported(monkeypatch):
    """PyTorch 2.10 and 2.11 do take it for that: lean layers were ordinary ones there."""
    x = torch.zeros(1)
    assert not is_compiled()
    assert compiled(Asks())(x).item() == 1
    for strict in (False, True):
        assert torch.export.export(Asks(), (x, ), strict=strict).module()(x).item() == 0

    monkeypatch.setattr(graph, '_asks_exporting', lambda: True)
    assert compiled(Asks())(x).item() == 1
    # Where its private flag is gone, what it says counts.
    monkeypatch.setattr(graph, 'torch', SimpleNamespace(compiler=SimpleNamespace()))
    assert graph._is_exporting()
