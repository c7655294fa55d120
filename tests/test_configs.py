"""Every shipped config: it is listed, fits its siblings, builds, and takes a training step."""
from __future__ import annotations

import argparse
import collections
import copy
import functools
import pathlib
import re

import numpy as np
import pytest
import torch
import yaml
from mmengine.dataset import pseudo_collate
from mmengine.runner import set_random_seed

from mmprotune.config_nodes import without_pretrained
from mmprotune.engine import cli
from mmprotune.engine.runner import build_runner
from mmprotune.models import PromptedBackbone
from mmprotune.registry import MODELS
from mmprotune.testing.noise_batch import noise_item

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
# A classifier has no head to name.
NAME = re.compile(
    r'((?P<model>\w+)_)?(?P<backbone>[a-z0-9-]+)_(?P<method>protune|frozen|full)_(?P<data>[a-z0-9]+)')
# The quickstart's own are no recipes to choose from.
RECIPES = [path for path in CONFIGS if '_shapes' not in path.stem]
SIZE = 64  # pixels


def is_larger_variant(path: pathlib.Path) -> bool:
    """Whether a smaller size of the same backbone stands beside it: swin-b beside swin-t."""
    match = NAME.fullmatch(path.stem)
    family, _, size = match['backbone'].partition('-')
    smaller = 'tsbl'[:'tsbl'.find(size)] if size in tuple('tsbl') else ''
    return any(path.with_name(path.name.replace(f'_{family}-{size}_', f'_{family}-{other}_'))
               in CONFIGS for other in smaller)


all_configs = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
# Larger variants run the same code for longer.
all_configs_to_train = pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if is_larger_variant(path) else [])
    for path in CONFIGS
])


@functools.cache
def parsed(path: pathlib.Path):
    return cli.load_config(str(path))


@pytest.fixture
def cfg(path):
    return copy.deepcopy(parsed(path))


def make_small(cfg) -> bool:
    """Small inputs and little sampling on a CPU; whether all layers stay as configured. Those that
    have a parameter for each query or position do not."""
    few_samples(cfg.model.get('train_cfg'))
    same = 'num_queries' not in cfg.model
    if not same:  # picked among the tokens, and small images have few
        cfg.model.num_queries = 20
    for owner, key in (
        (cfg.model.get('data_preprocessor'), 'size'),
        (cfg.get('data_preprocessor'), 'size'),
        (cfg.model.backbone, 'img_size'),
        (cfg.model.backbone.get('backbone'), 'img_size'),
    ):
        if owner and owner.get(key) is not None:
            owner[key] = (SIZE, SIZE)
            same &= key != 'img_size'
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        cfg.optim_wrapper.type = 'OptimWrapper'
        for key in ('loss_scale', 'dtype'):
            cfg.optim_wrapper.pop(key, None)
    return same


def few_samples(node) -> None:
    """Regions per image: a handful trains the same parameters as the usual 512, in less time."""
    if isinstance(node, dict):
        if isinstance(node.get('sampler'), dict) and 'num' in node['sampler']:
            node['sampler']['num'] = 8
        for child in node.values():
            few_samples(child)


@functools.cache
def parameters_in_readme() -> dict[str, tuple[int, int]]:
    """By config, those that train and all of them, as configs/README.md has it."""
    rows = re.findall(r'^\| \[([\w-]+)\]\([\w.-]+\) \| ([\d,]+) \| ([\d,]+) \|',
                      (ROOT / 'configs' / 'README.md').read_text(), flags=re.MULTILINE)
    return {name: tuple(int(number.replace(',', '')) for number in numbers)
            for name, *numbers in rows}


@all_configs
def test_name_follows_the_rule(path):
    assert NAME.fullmatch(path.stem)


def test_recipes_are_listed():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    listed = {
        model['Config']
        for file in index['Import']
        for model in yaml.safe_load((ROOT / file).read_text())['Models']
    }
    assert listed == {f'configs/{path.name}' for path in RECIPES}
    readme = (ROOT / 'configs' / 'README.md').read_text()
    assert [path.stem for path in RECIPES if f'[{path.stem}]({path.name})' not in readme] == []


def test_methods_differ_in_the_backbone_only():
    families = collections.defaultdict(dict)
    for path in RECIPES:
        match = NAME.fullmatch(path.stem)
        family = match['model'], match['backbone'], match['data']
        families[family][match['method']] = parsed(path).to_dict()
    compared = 0
    for methods in families.values():
        if list(methods) == ['full']:  # tools/benchmark_methods.py wraps it
            continue
        for name, content in methods.items():
            backbone = content['model'].pop('backbone')
            content['model'].pop('pretrained', None)
            if 'ImageClassifier' in content['model']['type']:  # each has the rate of its own sweep
                rate = content['optim_wrapper']['optimizer'].pop('lr')
                assert rate == dict(full=1e-3, frozen=1e-2, protune=3e-3)[name]
            prompted = name != 'full'
            assert (backbone['type'] == 'mmprotune.PromptedBackbone') == prompted
            if prompted:
                assert (backbone['prompt'] is None) == (name == 'frozen')
            hooks = content.pop('custom_hooks', None) or []
            ours = [hook['type'] for hook in hooks if hook['type'].startswith('mmprotune.')]
            assert len(ours) == (3 if prompted else 0)
            content['_stock'] = backbone.get('backbone') if prompted else backbone
        for content in methods.values():
            assert content == methods['protune']
            compared += 1
    assert compared > len(families)


@all_configs
def test_places(path, cfg):
    """Of docs/results/methods.md: by the backbone's structure, but at stage ends in detectors."""
    backbone = cfg.model.backbone
    if backbone.type != 'mmprotune.PromptedBackbone' or '_shapes' in path.stem:
        return
    detects = cfg.default_scope == 'mmdet'
    assert backbone.get('insert') == (None if detects else 'auto')


def test_partners():
    """As configs/README.md has it: a model alone, with both its partners, or for the benchmark."""
    families = collections.defaultdict(set)
    for path in RECIPES:
        match = NAME.fullmatch(path.stem)
        families[match['model'], match['backbone'], match['data']].add(match['method'])
    known = ({'protune'}, {'protune', 'frozen', 'full'}, {'full'})
    assert {family: found for family, found in families.items() if found not in known} == {}
    readme = (ROOT / 'configs' / 'README.md').read_text()
    listed = readme.partition('| config, to compare methods with |')[2].partition('\n\n')[0]
    alone = {path.stem for path in RECIPES if families[
        tuple(NAME.fullmatch(path.stem)[key] for key in ('model', 'backbone', 'data'))] == {'full'}}
    assert alone == set(re.findall(r'\[([\w-]+)\]', listed))


@pytest.mark.parametrize('family', ['mask_rcnn_r18_{}_shapes', 'upernet_swin-t_{}_ade20k'])
def test_head_only_is_an_option_of_any_config(family):
    """As configs/README.md says, where there is no file for it."""
    path = ROOT / 'configs' / f'{family.format("protune")}.py'
    parser = argparse.ArgumentParser()
    cli.add_config_arguments(parser)
    option = parser.parse_args([str(path), '--cfg-options', 'model.backbone.prompt=None'])
    assert cli.read_config(option).to_dict() == parsed(
        path.with_name(f'{family.format("frozen")}.py')).to_dict()


@pytest.mark.parametrize('options', [
    ['model.backbone.prompt=None'],
    ['model.backbone.prompt=None', "model.backbone.trainable=['.*']"]], ids=['head', 'full'])
def test_what_trains_with_these_options(options):
    parser = argparse.ArgumentParser()
    cli.add_config_arguments(parser)
    path = ROOT / 'configs' / 'mask_rcnn_r18_protune_shapes.py'
    cfg = without_pretrained(cli.read_config(
        parser.parse_args([str(path), '--cfg-options', *options])))
    backbone = MODELS.build(cfg.model.backbone)
    assert not len(backbone.prompts)
    assert {p.requires_grad for p in backbone.parameters()} == {len(options) == 2}


@all_configs_to_train
def test_one_step_changes_the_declared_parameters_only(path, cfg, tmp_path):
    cfg = without_pretrained(cfg)
    same_layers = make_small(cfg)
    cfg.launcher = 'none'
    cfg.work_dir = str(tmp_path)
    cfg.experiment_name = path.stem
    set_random_seed(0)
    runner = build_runner(cfg)
    model = runner.model
    model.init_weights()
    optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)

    prompted = isinstance(model.backbone, PromptedBackbone)
    assert prompted == (NAME.fullmatch(path.stem)['method'] != 'full')
    if prompted:
        assert bool(model.backbone.prompts) == (cfg.model.backbone.prompt is not None)
        declared = {
            name
            for name, param in model.named_parameters()
            if not name.startswith('backbone.backbone.')
        }
        frozen_buffers = {
            name for name, _ in model.named_buffers() if name.startswith('backbone.backbone.')}
    else:
        declared = {name for name, param in model.named_parameters() if param.requires_grad}
        assert any(name.startswith('backbone.') for name in declared)
        frozen_buffers = set()

    parameters = dict(model.named_parameters())
    if same_layers and path in RECIPES:
        assert parameters_in_readme()[path.stem] == (
            sum(p.numel() for p in parameters.values() if p.requires_grad),
            sum(p.numel() for p in parameters.values()))
    tensors = dict([*parameters.items(), *model.named_buffers()])
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    model.train()
    rng = np.random.default_rng(0)
    items = [noise_item(cfg, SIZE, rng) for _ in range(2)]
    log = model.train_step(pseudo_collate(items), optim_wrapper)

    assert torch.isfinite(log['loss'])
    changed = {name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])}
    stepped = {
        name
        for name, param in parameters.items() if param in optim_wrapper.optimizer.state}
    # Every declared parameter got a gradient and a step, and nothing else moved. (A first step can
    # leave values as they are: behind a zero the gradient is zero.)
    assert stepped == declared
    assert changed & parameters.keys()
    assert changed & parameters.keys() <= declared
    assert not changed & frozen_buffers
