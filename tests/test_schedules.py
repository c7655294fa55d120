"""The rate and the decay of every parameter of prompts, through the schedule of each config.

A stand-in takes the model's place: prompts on a small backbone, and one layer for each neck and
head.
"""
from __future__ import annotations

import copy
import fnmatch
import functools

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from torch import nn

from mmprotune.config_nodes import type_name
from mmprotune.engine.config import set_prompt_rates
from mmprotune.engine.optim import PROMPT_MULTIPLIERS
from tests.conftest import RESNET18, build
from tests.test_configs import CONFIGS, NAME, parsed

# Peak; start and end as shares of it; which parameters of prompts do not decay.
NORMS, FLAT = 'norms', 'norms and biases'
RECIPES = {
    '*_rcnn_r50_*_coco': (2e-4, 1e-3, 1e-2, FLAT),
    'dino_*': (1e-4, 1., 0.1, ''),
    'retinanet_*': (1e-4, 1e-3, 1e-2, FLAT),
    'rtmdet_*': (4e-3, 1e-5, 0.05, FLAT),
    'cascade_*': (1e-4, 1e-3, 1e-2, FLAT),
    'mask_rcnn_convnext-*': (1e-4, 1e-3, 1e-2, FLAT),
    'mask_rcnn_swin-*': (1e-4, 1e-3, 1e-2, NORMS),
    '*_pennfudan': (2e-4, 1e-2, 1e-2, FLAT),
    '*_shapes': (2e-3, 1e-2, 5e-3, ''),
    '*_ade20k': (6e-5, 1e-6, 0., NORMS),
    'segformer_*': (6e-4, 1e-6, 0., NORMS),
    'upernet_beit-*': (3e-5, 1e-6, 0., FLAT),
    'upernet_convnext-*': (1e-4, 1e-6, 0., FLAT),
    '*_camvid': (5e-4, 1e-3, 0., ''),
    '*_cifar10': (1e-2, 1e-2, 0., FLAT),
    '*_protune_cifar10': (3e-3, 1e-2, 0., FLAT),
    '*_full_cifar10': (1e-3, 1e-2, 0., FLAT),
    'linear_*_cifar10': (1e-3, 1e-2, 0., FLAT),
}
# Images that all processes together take in one step, where it is not 16.
BATCHES = {'rtmdet_*': 256, '*_pennfudan': 4, '*_camvid': 4, '*_shapes': 8, '*_cifar10': 64,
           'linear_*_cifar10': 32}
# The rate of prompts, of the head's, where a config has one of its own.
RATES = {'*_r18_protune_shapes': 7}
EPOCH, SHORT = 50, 157  # iterations of an epoch; where there are few of them
all_configs = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)


def recipe(name: str, table: dict):
    """The longest pattern that fits a config's name says it."""
    fits = [pattern for pattern in table if fnmatch.fnmatch(name, pattern)]
    return table[max(fits, key=len)] if fits else None


@functools.cache
def wrapper() -> nn.Module:
    return build(dict(
        type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all', lean=False,
        prompt=dict(type='mmprotune.PromptBlock', norm_cfg=dict(type='BN'))))


def stand_in(cfg) -> nn.Module:
    model = nn.Module()
    names = [name for name in cfg.model if name.endswith(('head', 'neck'))]
    for name in names:
        model.add_module(name, nn.Linear(2, 2))
    prompted = type_name(cfg.model.backbone) == 'PromptedBackbone'
    if not prompted or cfg.model.backbone.prompt is not None:
        model.backbone = wrapper() if prompted else nn.Linear(2, 2)
    assert any(name.endswith('head') for name in names)
    return model


def settings(cfg, model) -> dict[str, dict]:
    """Group of the optimizer by name of the parameter; groups that are alike are one."""
    cfg.optim_wrapper.type = 'OptimWrapper'  # some train in mixed precision, on a GPU
    for key in ('loss_scale', 'dtype'):
        cfg.optim_wrapper.pop(key, None)
    names = {id(param): name for name, param in model.named_parameters()}
    alike, found = {}, {}
    for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
        one = alike.setdefault((group['lr'], group['weight_decay']), dict(
            params=[], lr=group['lr'], weight_decay=group['weight_decay']))
        for param in group['params']:
            one['params'].append(param)
            found[names[id(param)]] = one
    return found


def walk(cfg, groups: list[dict]) -> list[list[float]]:
    """Rates of each group before every step. Long schedules pass a hundred times as fast."""
    schedulers = copy.deepcopy(cfg.param_scheduler)
    fast = 100 if any(not s.get('by_epoch', True) and s.end >= 500 for s in schedulers) else 1
    for scheduler in schedulers:
        if not scheduler.get('by_epoch', True):
            scheduler.begin, scheduler.end = scheduler.begin // fast, scheduler.end // fast
    epochs = cfg.train_cfg.get('max_epochs')
    length = SHORT if epochs and epochs < 5 else EPOCH
    optimizer = torch.optim.SGD(groups)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        built = [PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer, epoch_length=length))
                 for s in schedulers]
    steps = epochs * length if epochs else cfg.train_cfg.max_iters // fast
    rates = []
    for step in range(1, steps + 1):
        rates.append([group['lr'] for group in optimizer.param_groups])
        optimizer.step()
        for scheduler in built:
            if not scheduler.by_epoch or step % length == 0:
                scheduler.step()
    return [list(one) for one in zip(*rates)]


@all_configs
def test_rates_and_decay(path):
    cfg = copy.deepcopy(parsed(path))
    peak, start, end, exempt = recipe(path.stem, RECIPES)
    faster = recipe(path.stem, RATES) or PROMPT_MULTIPLIERS['lr_mult']
    set_prompt_rates(cfg)
    model = stand_in(cfg)
    by_name = settings(cfg, model)
    groups = list({id(group): group for group in by_name.values()}.values())
    history = dict(zip(map(id, groups), walk(cfg, groups)))

    prompts = {name for name in by_name if '.prompts.' in name}
    assert bool(prompts) == (NAME.fullmatch(path.stem)['method'] == 'protune')
    heads = {name for name in by_name if name.endswith('head.weight')}
    assert heads
    for name in prompts | heads:
        rates = history[id(by_name[name])]
        times = faster if name in prompts else 1.
        # Some decay from the first step on, while they warm up.
        assert max(rates) == pytest.approx(peak * times, rel=0.03), name
        assert rates[0] == pytest.approx(start * peak * times), name
        assert rates[-1] == pytest.approx(end * peak * times, abs=1e-2 * peak * times), name
    for rates in history.values():
        top = rates.index(max(rates))
        # Up to the peak, then down, and far.
        assert rates[:top + 1] == sorted(rates[:top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[-1] <= 0.1 * rates[top]

    decay = cfg.optim_wrapper.optimizer.weight_decay
    for name in prompts:
        is_norm, is_bias = '.norm.' in name, name.endswith('.bias')
        free = exempt == FLAT and (is_norm or is_bias) or exempt == NORMS and is_norm
        wanted = 0. if free else decay * PROMPT_MULTIPLIERS['decay_mult']
        assert by_name[name]['weight_decay'] == pytest.approx(wanted), name


@all_configs
def test_the_batch_that_a_rate_is_for(path):
    cfg = parsed(path)
    batch = recipe(path.stem, BATCHES) or 16
    assert cfg.auto_scale_lr.base_batch_size == batch
    assert not cfg.auto_scale_lr.get('enable', False)
    assert batch % cfg.train_dataloader.batch_size == 0
