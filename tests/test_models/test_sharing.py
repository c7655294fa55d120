"""Which layers of two networks are the same."""
from torch import nn

from mmprotune.models.sharing import shared_paths

from .test_session import Noting, networks


def test_settings_that_differ_are_not_shared():
    one, two = networks()
    assert shared_paths(one, two) == {'first', 'second'}
    two.second.gain = 2.
    assert shared_paths(one, two) == {'first', 'second.linear'}
    two.first.linear.register_forward_hook(lambda *_: None)  # runs inside of `first`
    assert shared_paths(one, two) == {'first.linear', 'second.linear'}
    two.first.linear.weight = nn.Parameter(one.first.linear.weight.clone())
    assert shared_paths(one, two) == {'second.linear'}
    two.second.linear.forward = lambda x: x
    assert shared_paths(one, two) == set()


def test_layers_that_leave_notes_are_not_shared():
    assert shared_paths(*networks(first=Noting)) == {'first.linear', 'second'}
