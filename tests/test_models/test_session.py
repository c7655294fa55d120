"""Layers run once for several networks, and what they return is each one's own."""
from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmprotune.freezing import adopt
from mmprotune.models.session import Session
from mmprotune.models.sharing import install, shared_paths


class Layer(nn.Module):
    """Counts its calls."""

    def __init__(self, gain: float = 1.) -> None:
        super().__init__()
        self.linear, self.gain, self.calls = nn.Linear(4, 4), gain, []

    def forward(self, x, scale=1.):
        self.calls.append(1)
        return self.linear(x) * self.gain * scale


class Noting(Layer):

    def forward(self, x):
        self.seen = x.shape
        return super().forward(x)


class InPlace(Layer):

    def forward(self, x):
        return super().forward(x.relu_())


class Odd(Layer):

    def forward(self, x):
        return SimpleNamespace(x=super().forward(x))


class Network(nn.Module):
    """A layer, glue that changes what it returns, and another layer."""

    def __init__(self, first=Layer, glue=torch.Tensor.add_, **kwargs) -> None:
        super().__init__()
        self.first, self.second = first(**kwargs), Layer()
        self.glue = [glue]

    def forward(self, x, scale=1.):
        y = self.first(x)
        y = self.glue[0](getattr(y, 'x', y), 1)
        return [self.second(y, scale=scale)]


def networks(count=2, **kwargs) -> list[Network]:
    """Networks in one memory that are not the same as a whole."""
    torch.manual_seed(0)
    first = Network(**kwargs).eval().requires_grad_(False)
    others = [copy.deepcopy(first) for _ in range(count - 1)]
    for i, other in enumerate(others):
        adopt(other, first.state_dict())
        other.number = i
    return [first, *others]


def run(nets: list[Network], *inputs, **kwargs) -> tuple[list, list]:
    """Outputs, and the modules that each network did not run itself."""
    names = [str(i) for i in range(len(nets))]
    for a in nets:
        for b in nets:
            if a is not b:
                install(a, shared_paths(a, b))
    session = Session({name: SimpleNamespace(stages=[]) for name in names},
                      lambda a, b: shared_paths(nets[int(a)], nets[int(b)]))
    outputs = []
    with torch.no_grad():
        for i, net in enumerate(nets):
            with session.task(names[i]):
                outputs.append(net(inputs[i % len(inputs)], **kwargs))
    return outputs, [[path for _, path in session.taken[name]] for name in names]


def count(net) -> list[int]:
    return [len(net.first.calls), len(net.second.calls)]


@pytest.fixture(autouse=True)
def _calls_do_not_count(monkeypatch):
    """Their record is no setting."""
    from mmprotune.models import sharing
    monkeypatch.setattr(sharing, '_IDLE', sharing._IDLE | {'calls'})


def test_what_is_changed_in_place_is_copied_from_the_second_image_on():
    nets, x = networks(3), torch.randn(2, 4)
    with torch.no_grad():
        expected = copy.deepcopy(nets[0])(x)[0]
    outputs, taken = run(nets, x)
    assert taken == [[], ['second'], ['second']]  # of equal inputs, not of the same ones
    again, taken = run(nets, x)
    assert taken == [[], ['first', 'second'], ['first', 'second']]
    assert all(torch.equal(y[0], expected) for y in (*outputs, *again))
    assert [count(net) for net in nets] == [[2, 2], [1, 0], [1, 0]]


def test_other_inputs_and_arguments():
    x = torch.randn(2, 4)
    assert run(networks(), x, x.clone())[1] == [[], ['second']]
    # Equal values that are laid out otherwise may be rounded otherwise by the first layer.
    turned = x.t().contiguous().t()
    for other, shared in ((x + 1, []), (x * 1.001, []), (x[:1], []), (turned, ['second'])):
        nets = networks()
        outputs, taken = run(nets, x, other)
        assert taken == [[], shared]
        with torch.no_grad():
            assert torch.equal(outputs[1][0], copy.deepcopy(nets[1])(other)[0])
    nets = networks()
    outputs, taken = run(nets, x, scale=2.)
    assert taken == [[], ['second']]
    assert not torch.equal(outputs[0][0], run(nets, x)[0][0][0])


def test_layers_that_leave_notes_run_themselves():
    nets = networks(first=Noting, glue=torch.Tensor.add)
    run(nets, torch.randn(2, 4))
    assert nets[1].first.seen == (2, 4)


def test_layers_that_change_their_input_run_themselves():
    """Who comes behind may read it."""
    nets, x = networks(first=InPlace, glue=torch.Tensor.add), torch.randn(2, 4)
    inputs = [x.clone(), x.clone()]
    _, taken = run(nets, *inputs)
    assert taken == [[], ['second']]
    assert torch.equal(inputs[1], x.relu())


def test_results_of_unknown_kinds_are_not_shared():
    nets = networks(first=Odd, glue=torch.Tensor.add)
    assert run(nets, torch.randn(2, 4))[1] == [[], ['second']]
    assert [count(net) for net in nets] == [[1, 1], [1, 0]]


def test_whole_networks_hand_out_containers_of_their_own():
    nets = networks()
    del nets[1].number
    x = torch.randn(2, 4)
    outputs, taken = run(nets, x)
    assert taken == [[], ['']]
    assert outputs[0] is not outputs[1] and outputs[0][0] is outputs[1][0]
    assert count(nets[1]) == [0, 0]


def test_outside_of_sessions_nothing_is_kept():
    nets, x = networks(), torch.randn(2, 4)
    run(nets, x)
    with torch.no_grad():
        nets[1](x)
    assert count(nets[1])[0] == 2
