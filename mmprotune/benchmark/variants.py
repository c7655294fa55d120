"""The variants of a training step that are measured beside each other, each ready to step."""
from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model.efficient_conv_bn_eval import (
    efficient_conv_bn_eval_control,
    turn_on_efficient_conv_bn_eval,
)
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprotune.config_nodes import without_pretrained
from mmprotune.lean import onednn
from mmprotune.lean.dry_run import tensors_in
from mmprotune.testing.noise_batch import noise_item

VARIANTS = ('full', 'frozen', 'naive', 'lean')
TITLES = dict(full='full fine-tuning', frozen='head only', naive='prompted, naive',
              lean='prompted, lean', lora='LoRA', compiled='lean, compiled',
              budget='lean, compiled, half', with_cp='full, with_cp',
              naive_with_cp='naive, with_cp', efficient_conv_bn_eval='full, conv_bn_eval')
# What the hosts have themselves to keep less: the backbone's blocks computed twice, and
# convolution and BatchNorm as one.
HOSTS = ('with_cp', 'naive_with_cp', 'efficient_conv_bn_eval')
# What `compile` of these variants adds to the config's own and to --compile.
COMPILED = dict(compiled={}, budget=dict(activation_memory_budget=0.5))
# What --ablate takes out of the lean variant, one at a time.
PARTS = ('product', )
TITLES.update({f'without {part}': f'lean, without {part}' for part in PARTS})
# Linear layers of attention, as the three libraries name them; where attention has none, the MLP's.
LORA_TARGETS = ((r'.*qkv', r'.*\.proj'), (r'.*ffn.*', ))


def variant_cfg(cfg: Config, variant: str, options: dict | None = None) -> Config:
    """The config with another way to train its backbone, and no pre-trained file.

    Args:
        cfg (Config): A config with a prompted backbone.
        variant (str): One of ``VARIANTS``, 'lora', one of ``COMPILED`` or ``HOSTS``, or
            'without …', see ``PARTS``.
        options (dict, optional): More options of ``compile`` for the compiled ones. Defaults to
            None.

    Returns:
        Config: A copy.
    """
    cfg = without_pretrained(copy.deepcopy(cfg))
    prompted = cfg.model.backbone
    if variant.endswith('with_cp'):
        prompted.backbone.with_cp = True
    if variant in ('full', 'lora', 'with_cp', 'efficient_conv_bn_eval'):
        cfg.model.backbone = prompted.backbone
    elif variant == 'frozen':
        cfg.model.backbone = dict(prompted, prompt=None, lean=False, compile=False)
    else:
        lean = prompted.get('lean', True) or True
        own = prompted.get('compile', False)
        compile_ = False if variant not in COMPILED else {
            **({} if isinstance(own, bool) else own), **(options or {}), **COMPILED[variant]}
        cfg.model.backbone = dict(
            prompted, lean=False if variant.startswith('naive') else lean, compile=compile_)
    return cfg


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    """While open, lean layers do not use the oneDNN product.

    Args:
        part (str): One of ``PARTS``; anything else changes nothing.
    """
    own = getattr(onednn, part, None)
    if own is not None:
        setattr(onednn, part, lambda *_: None)
    try:
        yield
    finally:
        if own is not None:
            setattr(onednn, part, own)


def lora(backbone: dict) -> nn.Module | None:
    """Builds ``mmpretrain.LoRAModel`` around a backbone, rank 16.

    Args:
        backbone (dict): Its config.

    Returns:
        nn.Module, optional: None where there is no linear layer to adapt.
    """
    from mmpretrain.models.peft import LoRAModel
    for targets in LORA_TARGETS:
        with contextlib.suppress(ValueError):
            return LoRAModel(backbone, alpha=16, rank=16, targets=[dict(type=t) for t in targets])
    return None


def fuse_norms(model: nn.Module) -> str | None:
    """Turns MMEngine's ``efficient_conv_bn_eval`` on for a model's backbone.

    Args:
        model (nn.Module): The model, in training mode; changed in place.

    Returns:
        str, optional: Why that changes nothing, None where it does.
    """
    if all(norm.training for norm in model.backbone.modules() if isinstance(norm, _BatchNorm)):
        return 'no BatchNorm that stands still'
    try:
        turn_on_efficient_conv_bn_eval(model, 'backbone')
    except Exception as error:  # its tracer follows few networks
        return f'torch.fx does not trace it ({type(error).__name__})'
    graph = model.backbone.forward.__self__.graph
    if not any(node.target is efficient_conv_bn_eval_control for node in graph.nodes):
        return 'no convolution with a BatchNorm behind it'
    return None


def draw_batch(cfg: Config, args: argparse.Namespace) -> dict:
    """The same batch for every variant: noise, or the first images of the training set."""
    rng = np.random.default_rng(0)
    if not args.data:
        return pseudo_collate([noise_item(cfg, args.size, rng) for _ in range(args.batch_size)])
    np.random.seed(0)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return pseudo_collate([dataset[i] for i in range(args.batch_size)])


class Backbone(nn.Module):
    """A backbone alone, with a loss that reads all of its features and keeps nothing."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return sum(t.float().mean() for t in tensors_in(self.backbone(images)))


class Variant:
    """One way to train, ready to step.

    Args:
        cfg (Config): Its config.
        name (str): As of :func:`variant_cfg`.
        args (argparse.Namespace): Of ``benchmark_training.py``.
    """

    def __init__(self, cfg: Config, name: str, args: argparse.Namespace) -> None:
        self.name, self.device = name, torch.device(args.device)
        self._without = name.partition('without ')[2]
        self.amp = getattr(torch, args.amp) if args.amp else None
        self._memory_format = (
            torch.channels_last if args.channels_last else torch.contiguous_format)
        torch.manual_seed(0)
        self.lacks: str | None = None  # why there is no such variant
        try:
            model = MODELS.build(cfg.model)
        except TypeError as error:
            if "'with_cp'" not in str(error):
                raise
            self.lacks = 'no with_cp'
            return
        if name == 'lora':
            model.backbone = lora(cfg.model.backbone)
            self.lacks = None if model.backbone is not None else 'no linear layers'
        if name == 'efficient_conv_bn_eval':
            self.lacks = fuse_norms(model.train())
        if self.lacks:
            return
        for block in getattr(model.backbone, 'prompts', {}).values():
            for parameter in block.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.02)  # as after some training
        batch = draw_batch(cfg, args)
        if args.backbone_only:
            model.data_preprocessor.to(self.device)
            images = model.data_preprocessor(copy.deepcopy(batch), True)['inputs']
            images = images.contiguous(memory_format=self._memory_format)
            self.model = Backbone(model.backbone)
            self._loss: Callable = lambda: self.model(images)
            self._infer: Callable = lambda: self.model.backbone(images)
        else:
            self.model = model
            self._batch = batch
            self._loss = self._model_loss
            self._infer = lambda: self.model(**self._data(), mode='tensor')
        self.model.to(self.device).train()
        # A baseline whose backbone is all there is has nothing to train.
        self.trains = any(p.requires_grad for p in self.model.parameters())
        self.optimizer = build_optim_wrapper(
            self.model, dict(type='OptimWrapper', optimizer=dict(
                type='AdamW', lr=1e-5))).optimizer if self.trains else None

    def _model_loss(self) -> torch.Tensor:
        # The same regions for every variant.
        torch.manual_seed(0)
        np.random.seed(0)
        losses = self.model(**self._data(), mode='loss')
        return self.model.parse_losses(losses)[0]

    def _data(self) -> dict:
        data = self.model.data_preprocessor(copy.deepcopy(self._batch), self.model.training)
        data['inputs'] = data['inputs'].contiguous(memory_format=self._memory_format)
        return data

    def loss(self) -> torch.Tensor:
        """The loss, in its graph."""
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None), \
                without(self._without):
            return self._loss()

    def step(self) -> tuple[float, float, float]:
        """One training step; seconds of forward, backward and optimizer."""
        times = [self._now()]
        loss = self.loss()
        times.append(self._now())
        if self.trains:
            with without(self._without):
                loss.backward()
        times.append(self._now())
        if self.trains:
            self.optimizer.step()
            self.optimizer.zero_grad()
        times.append(self._now())
        return tuple(b - a for a, b in zip(times, times[1:]))

    def infer(self) -> float:
        """Seconds of one forward pass in eval mode, without a graph and what follows the network's
        outputs."""
        self.model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, self.amp,
                                             enabled=self.amp is not None), \
                without(self._without):
            start = self._now()
            self._infer()
            seconds = self._now() - start
        self.model.train()
        return seconds

    def _now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()
