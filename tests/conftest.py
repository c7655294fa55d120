"""What the tests share: small real backbones and detectors, drawn pre-trained files, data sets."""
from __future__ import annotations

import copy
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

warnings.filterwarnings('ignore', message='pkg_resources is deprecated')

RESNET18 = dict(
    type='mmdet.ResNet', depth=18, base_channels=8, norm_eval=True, out_indices=(0, 1, 2, 3))


@pytest.fixture(scope='module', autouse=True)
def _mmdet_scope_of_fixtures():
    """Those that a module's tests share come first, after whatever another module left."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture(autouse=True)
def _mmdet_scope():
    """Short type names mean mmdet's, as in its own configs."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture(autouse=True)
def _loggers_with_open_streams():
    """A logger outlives its test, and the stream that capsys gave it does not."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            stream = getattr(handler, 'stream', None)  # a file not yet written to has none
            if isinstance(handler, logging.StreamHandler) and getattr(stream, 'closed', False):
                handler.stream = sys.stdout  # setStream() would flush the closed one


@pytest.fixture(scope='session')
def assets() -> Path:
    """Folder of real data and weights, from the environment variable MMPROTUNE_ASSETS."""
    folder = os.environ.get('MMPROTUNE_ASSETS')
    if not folder:
        pytest.skip('MMPROTUNE_ASSETS is not set: no real data and weights to test with')
    return Path(folder)


@pytest.fixture(scope='session')
def resnet18_file(tmp_path_factory) -> str:
    """A pre-trained file for RESNET18, BatchNorm statistics included."""
    return _weights_of(RESNET18, tmp_path_factory.mktemp('weights') / 'resnet18.pth', seed=1)


def _weights_of(cfg: dict, path: Path, seed: int) -> str:
    from mmdet.registry import MODELS
    torch.manual_seed(seed)
    model = MODELS.build(copy.deepcopy(cfg))
    model.init_weights()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope='session')
def other_resnet18_file(tmp_path_factory) -> str:
    return _weights_of(RESNET18, tmp_path_factory.mktemp('weights') / 'other18.pth', seed=2)


@pytest.fixture
def prompted_cfg(resnet18_file) -> dict:
    """Config of a prompted backbone with a pre-trained file."""
    return dict(
        type='mmprotune.PromptedBackbone',
        backbone=dict(RESNET18, init_cfg=dict(type='Pretrained', checkpoint=resnet18_file)),
        prompt=dict(type='mmprotune.PromptBlock'))


def build(cfg: dict, seed: int = 0):
    """Builds a model of any registered kind, seeded."""
    from mmprotune.registry import MODELS
    torch.manual_seed(seed)
    return MODELS.build(copy.deepcopy(cfg))


def wake(module, seed: int = 0) -> None:
    """Gives zero-initialised prompts random weights, so that they change the features."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if '.expand.weight' in name or name == 'expand.weight':
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif 'prompts.' in name and name.endswith('.gamma'):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 1)


def autocast(dtype: torch.dtype):
    """Autocast on the CPU; skips the test where PyTorch has none in this dtype."""
    try:
        with torch.autocast('cpu', dtype):
            pass
    except RuntimeError as error:
        pytest.skip(f'torch {torch.__version__}: {error}')
    return torch.autocast('cpu', dtype)
