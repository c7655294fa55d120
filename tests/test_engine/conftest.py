"""Machines with and without a GPU."""
import pytest

from mmprotune.engine import processes, training


def _device(monkeypatch, name):
    for module in (processes, training):
        monkeypatch.setattr(module, 'get_device', lambda: name)


@pytest.fixture
def on_cpu(monkeypatch):
    _device(monkeypatch, 'cpu')


@pytest.fixture
def on_gpu(monkeypatch):
    _device(monkeypatch, 'cuda')
