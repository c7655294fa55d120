import pytest
import torch
from torch import nn

from mmprotune.freezing import FillRecorder
from tests.test_freezing.test_freeze import network


def test_fill_recorder_sees_what_fits():
    original = nn.Module._load_from_state_dict
    state = network().state_dict()
    del state['0.bias']
    state['1.weight'] = torch.zeros(9)
    state['fc.weight'] = torch.zeros(1)

    class Built(nn.Module):
        """Loads in its constructor, as timm's models do."""

        def __init__(self):
            super().__init__()
            self.net = network()
            with pytest.raises(RuntimeError, match='size mismatch'):
                self.net.load_state_dict(state, strict=False)

    with FillRecorder() as recorder:
        built = Built()
    assert nn.Module._load_from_state_dict is original
    assert recorder.filled(built) == {
        f'net.{k}' for k in network().state_dict()} - {'net.0.bias', 'net.1.weight'}
    assert recorder.file_shapes == {k: tuple(v.shape) for k, v in state.items()}
    assert not recorder.filled(network())
