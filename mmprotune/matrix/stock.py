"""The stock model of a config: whether it builds, computes its losses and takes a step."""
from __future__ import annotations

import contextlib
import copy
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprotune.testing.noise_batch import noise_batch

from .configs import Run, runnable
from .failures import out_of_memory
from .files import submodule, write_files

# Sides of images to try, in pixels: the first that the stock model takes a step with is used.
SIZES = dict(mmdet=(128, 320, 512), mmseg=(64, 128, 512), mmpretrain=(64, 224, 384))
BATCH_SIZE = 2
OWN_SIZE = re.compile(r'"(?:img|image|input|pretrain_img)_size": \[?(\d+)')


def build(cfg: Config) -> nn.Module:
    """The model of a runnable config, its weights drawn the same at every call."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    init_default_scope(cfg.default_scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def take_step(model: nn.Module, cfg: Config, size: int, wrapper) -> bool:
    """One training step as the Runner takes it; whether its losses are finite."""
    hub = MessageHub.get_current_instance()
    for key, value in dict(iter=0, epoch=0, max_iters=1, max_epochs=1).items():
        hub.update_info(key, value)  # some heads warm up by it
    batch = noise_batch(cfg, size, BATCH_SIZE, np.random.default_rng(0))
    return all(bool(value.isfinite().all()) for value in model.train_step(batch, wrapper).values())


class _LossesAlone:
    """Takes the place of an optimizer's wrapper in a step that computes losses and no more."""

    @staticmethod
    def optim_context(model: nn.Module) -> contextlib.AbstractContextManager:
        return torch.no_grad()

    @staticmethod
    def update_params(loss: torch.Tensor) -> None:
        pass


def stock_model(run: Run) -> tuple[nn.Module, Config]:
    """The stock model of a run with its weights, and the config that it was built from."""
    cfg = runnable(run.cfg)
    model = build(cfg)
    if hasattr(model, 'init_weights'):
        model.init_weights()
    return model, cfg


def check_stock(run: Run, folder: Path) -> dict:
    """Builds the stock model, computes its losses and writes its files.

    The backbone's weights are moved a little before, so that a constant that is set anew (zero
    biases, norms) counts as moved weights. The statistics of the norms are those of the very
    images: with others, features and gradients of random weights vanish in deep networks.

    Args:
        run (Run): The run.
        folder (Path): For the files.

    Returns:
        dict: ``size`` of the images that it takes, ``larger`` ones, and whether its losses are
        ``finite``.
    """
    model, cfg = stock_model(run)
    backbone = submodule(model, 'backbone')
    with torch.no_grad():
        for tensor in () if backbone is None else backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.01)
                if tensor.dim() < 2 or not tensor.any():  # all of a kernel would shift its output
                    tensor.add_(1e-3)
    text = json.dumps(run.cfg.model.to_dict(), default=str)
    first, *others = SIZES[run.cfg.default_scope]
    sizes = [first, *map(int, OWN_SIZE.findall(text)), *others]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.register_forward_hook(_forget_few_values)
    failures = []
    for size in dict.fromkeys(sizes):
        model.train()
        for norm in norms:  # those of a backbone, too, which many detectors keep in eval mode
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None
        try:
            finite = take_step(model, cfg, size, _LossesAlone())
        except Exception as error:
            failures.append(error)
            if out_of_memory(error) or isinstance(error, NotImplementedError):
                raise
        else:
            write_files(model, run.cfg, folder)
            return dict(size=size, larger=[s for s in sizes if s > size], finite=finite)
    raise failures[-1]


def _forget_few_values(norm: nn.Module, args: tuple, output: torch.Tensor) -> None:
    """Forward hook: of a few values, whatever is a little different would be far out."""
    if args[0].numel() < 16 * norm.num_features:
        norm.reset_running_stats()


def check_stock_step(run: Run, folder: Path, stock: dict) -> dict:
    """Takes a whole training step with the stock model, as the prompted one had to.

    Args:
        run (Run): The run.
        folder (Path): Not used.
        stock (dict): What :func:`check_stock` returned.
    """
    model, cfg = stock_model(run)
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    model.train()
    take_step(model, cfg, stock['size'], wrapper)
    return {}
