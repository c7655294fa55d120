"""Classifiers over configs/_base_/cls_*: every backbone with every data set, by each method."""
from __future__ import annotations

import copy
import functools
import inspect
import pathlib
import re
import tempfile

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, OPTIM_WRAPPERS, init_default_scope
from mmengine.runner import set_random_seed

from mmprotune import checkpoint
from mmprotune.config_nodes import without_pretrained
from mmprotune.datasets import LongTailedDataset
from mmprotune.engine import cli
from mmprotune.evaluation.class_map import MAPS
from mmprotune.models import PromptedBackbone, calls
from mmprotune.registry import DATASETS
from mmprotune.testing.noise_batch import noise_item

from .classification import classification_scope, draw_folder
from .test_configs import make_small
from .test_tools.conftest import load_tool

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'
METHODS = ('full', 'protune', 'frozen')


def names(part: str) -> list[str]:
    return sorted(path.stem[len(part):] for path in (CONFIGS / '_base_').glob(f'{part}*.py'))


BACKBONES = names('cls_backbone_')
DATA = names('cls_data_')
# Larger ones run the same code for longer.
LARGE = ('swin-b', 'vit-b', 'convnext-b')
SIZE = 64  # pixels
# Residual branches, of which each has a prompt.
BRANCHES = {'r18': 8, 'r50': 16, 'vit-t': 24, 'vit-b': 24, 'swin-b': 48, 'convnext-b': 36}


@functools.cache
def parsed(method: str, backbone: str, data: str) -> Config:
    """The shipped CIFAR-10 configs with another backbone and data set."""
    text = (CONFIGS / 'resnet50_full_cifar10.py').read_text()
    for old, new in (('cls_backbone_r50', f'cls_backbone_{backbone}'),
                     ('cls_data_cifar10', f'cls_data_{data}')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    if data not in DECODED:
        text = text.replace(', to_rgb=False', '')
    texts = {'full': text, **{method: (CONFIGS / f'resnet50_{method}_cifar10.py').read_text()
                              for method in METHODS[1:]}}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in texts.items():
            (pathlib.Path(folder) / f'resnet50_{name}_cifar10.py').write_text(
                content.replace('./_base_/', f'{CONFIGS}/_base_/'))
        return cli.load_config(f'{folder}/resnet50_{method}_cifar10.py')


# What MMPretrain's classes hand over as images already, in RGB.
DECODED = ('cifar10', 'cifar100', 'cifar10_longtail')


def load(*args) -> Config:
    cfg = copy.deepcopy(parsed(*args))
    make_small(cfg)
    return cfg


def build(cfg):
    init_default_scope('mmpretrain')
    cfg = without_pretrained(cfg)
    cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    set_random_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def test_what_was_promised():
    assert {'r50', 'swin-b', 'vit-b', 'convnext-b'} <= set(BACKBONES)
    assert {'cifar10', 'cifar100', 'flowers102', 'dtd', 'pets', 'aircraft', 'cars', 'cub',
            'food101', 'imagenet'} <= set(DATA)
    readme = (CONFIGS / 'README.md').read_text()
    assert [name for name in (*BACKBONES, *DATA) if f'`{name}`' not in readme] == []


def test_configs_say_everything_themselves():
    """No environment variable changes what a config is."""
    assert [path.name for path in CONFIGS.rglob('*.py') if '{{$' in path.read_text() or
            "{{'$" in path.read_text() or 'environ' in path.read_text()] == []


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('data', DATA)
def test_data(data, method):
    cfg = load(method, 'r50', data)
    dataset = cfg.train_dataloader.dataset
    tested = cfg.test_dataloader.dataset
    if data == 'cifar10_longtail':
        assert dataset.type == 'mmprotune.LongTailedDataset'
        dataset = dataset.dataset
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == cfg.num_classes
    with classification_scope():
        cls = DATASETS.get(f'mmpretrain.{dataset.type}')
    known = getattr(cls, 'METAINFO', {}).get('classes')
    if known and dataset.type != 'CustomDataset':
        assert len(known) == cfg.num_classes
    # Every key is one that the class takes, and the two parts are different ones.
    for part in (dataset, tested):
        inspect.signature(cls.__init__).bind(None, **{k: v for k, v in part.items() if k != 'type'})
    assert {k: v for k, v in dataset.items() if k != 'pipeline'} != {
        k: v for k, v in tested.items() if k != 'pipeline'}
    # Files are read where the class does not hand images over, and those are BGR.
    reads = [step['type'] == 'LoadImageFromFile' for step in dataset.pipeline]
    decoded = dataset.type.startswith('CIFAR')
    assert reads == [not decoded, *[False] * (len(reads) - 1)]
    assert cfg.data_preprocessor.to_rgb == (not decoded)
    assert cfg.val_dataloader == cfg.test_dataloader


@pytest.mark.parametrize('data', ['cifar10_folder', 'pets'])
def test_pipelines_give_square_images(data, tmp_path):
    cfg = load('frozen', 'r18', data)
    draw_folder(tmp_path / 'x', (2, ))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        folder = dict(type='CustomDataset', data_root=str(tmp_path / 'x'),
                      pipeline=loader.dataset.pipeline)
        with classification_scope():
            assert DATASETS.build(folder)[0]['inputs'].shape == (3, 224, 224)


def test_a_long_tail():
    cfg = load('protune', 'r18', 'cifar10_longtail')
    assert cfg.train_dataloader.dataset.factor == 100
    assert cfg.val_evaluator[1].train_dataset == cfg.train_dataloader.dataset
    assert cfg.test_dataloader.dataset.type == 'CIFAR10'
    assert '_delete_' not in str(cfg.val_evaluator)


# --- docs/own_classification.md -------------------------------------------------------------------


def own(tmp_path, long_tailed: bool = False) -> str:
    """The config of that page, for a folder of drawn images."""
    text = (CONFIGS.parent / 'docs' / 'own_classification.md').read_text()
    for part, counts in (('train', (6, 6, 6)), ('val', (2, 2, 2))):
        draw_folder(tmp_path / 'mine' / part, counts)
    code, tail = re.findall(r'^```python\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)
    for place, here in (('mmprotune::', f'{CONFIGS}/'), ('data/mine', str(tmp_path / 'mine')),
                        ('cls_backbone_r50', 'cls_backbone_r18')):
        assert place in code
        code = code.replace(place, here)
    config = tmp_path / 'my_flowers.py'
    config.write_text(code + tail * long_tailed)
    return str(config)


def test_an_own_folder_trains_as_the_page_says(tmp_path):
    config = own(tmp_path)
    load_tool('train.py').main([
        config, '--work-dir', str(tmp_path / 'run'), '--cfg-options', 'train_cfg.max_epochs=1',
        'train_cfg.val_interval=1', 'model.backbone.freeze=all',
        'model.backbone.backbone.init_cfg=None', 'param_scheduler=[]',
        *(f'{part}_dataloader.num_workers=0' for part in ('train', 'val'))])
    meta = checkpoint.read(tmp_path / 'run' / 'epoch_1.pth')['meta']
    assert meta['dataset_meta']['classes'] == ('blue', 'green', 'red')
    assert meta['mmprotune']['backbones'].keys() == {'backbone'}
    cfg = cli.load_config(config)
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 3
    assert cfg.optim_wrapper.optimizer.lr == 3e-3 and cfg.auto_scale_lr.base_batch_size == 64


def test_an_own_long_tail_as_the_page_says(tmp_path):
    cfg = cli.load_config(own(tmp_path, long_tailed=True))
    with classification_scope():
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert isinstance(dataset, LongTailedDataset)
    assert dataset.class_counts == [6, 3, 2]
    assert dataset[0]['inputs'].shape == (3, 224, 224)


@pytest.mark.parametrize('backbone', [
    pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in BACKBONES])
def test_one_step_of_each_method(backbone):
    stocks = []
    for method in METHODS:
        cfg = load(method, backbone, 'dtd')
        stock = cfg.model.backbone if method == 'full' else cfg.model.backbone.backbone
        stocks.append(stock.to_dict())
        model = build(cfg)
        prompted = isinstance(model.backbone, PromptedBackbone)
        assert prompted == (method != 'full')
        declared = {n for n, p in model.named_parameters()
                    if method == 'full' or not n.startswith('backbone.backbone.')}
        assert any('prompts' in n for n in declared) == (method == 'protune')
        before = {n: t.detach().clone() for n, t in
                  [*model.named_parameters(), *model.named_buffers()]}
        wrapper = OPTIM_WRAPPERS.build(dict(
            type='OptimWrapper', optimizer=torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=1e-3)))
        rng = np.random.default_rng(0)
        items = [noise_item(cfg, SIZE, rng) for _ in range(2)]
        model.train()
        log = model.train_step(pseudo_collate(items), wrapper)
        assert torch.isfinite(log['loss'])
        got = {n for n, p in model.named_parameters() if p in wrapper.optimizer.state}
        assert got == declared
        if prompted:
            frozen = {n for n in before if n.startswith('backbone.backbone.')}
            tensors = dict([*model.named_parameters(), *model.named_buffers()])
            assert all(torch.equal(tensors[n], before[n]) for n in frozen)
    assert stocks[0] == stocks[1] == stocks[2]


@pytest.mark.parametrize('data', DATA)
def test_shifted_sets(data):
    """Each can be evaluated as far as its config goes: a dataset of its own, and a class map."""
    shifts = load('full', 'r50', data).get('shifts') or {}
    if data == 'imagenet':
        assert set(shifts) == {'imagenet_v2', 'imagenet_a', 'imagenet_r', 'imagenet_sketch'}
    known = {'imagenet': 4, 'cifar10': 16, 'cifar10_folder': 16, 'cifar10_longtail': 16}
    assert len(shifts) == known.get(data, 0)
    with classification_scope():
        for shift in shifts.values():
            cls = DATASETS.get(shift.dataset.type if '.' in shift.dataset.type
                               else f'mmpretrain.{shift.dataset.type}')
            keys = {k: v for k, v in shift.dataset.items() if k != 'type'}
            inspect.signature(cls.__init__).bind(None, **keys)
            assert shift.class_map in MAPS
    if data == 'cifar10':
        assert all(tuple(shift.dataset.classes) == tuple(
            DATASETS.get('mmpretrain.CIFAR10').METAINFO['classes']) for shift in shifts.values())


# --- what the classifier reads ----------------------------------------------------------------


def gradients(model) -> dict[str, float]:
    """Largest gradient of each prompt's last convolution, for the sum of two classes' logits."""
    torch.manual_seed(1)
    logits = model(torch.randn(2, 3, SIZE, SIZE), mode='tensor')
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    return {name: float(block.expand.weight.grad.abs().max())
            if block.expand.weight.grad is not None else 0.
            for name, block in model.backbone.prompts.items()}


@pytest.mark.parametrize('backbone', [
    pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in BACKBONES])
def test_the_last_prompt_reaches_the_classifier(backbone):
    """The pooled feature is that of the last block, whatever the backbone."""
    cfg = load('protune', backbone, 'dtd')
    if cfg.model.backbone.backbone.type == 'ResNet':
        cfg.model.backbone.backbone.zero_init_residual = False  # as after pre-training
    found = gradients(build(cfg))
    assert len(found) == BRANCHES[backbone]
    assert min(found.values()) > 0


def test_vit_reads_patches():
    """The mean of the patch tokens: a prompt on one of them moves the classifier's input."""
    cfg = load('protune', 'vit-t', 'dtd')
    assert cfg.model.backbone.backbone.out_type == 'avg_featmap'
    model = build(cfg).eval()
    backbone = model.backbone.backbone
    caught = []
    backbone.ln1.register_forward_hook(lambda module, args, output: caught.append(output))
    x = torch.randn(2, 3, SIZE, SIZE)
    feature, = model.extract_feat(x)
    tokens, = caught
    assert tokens.shape[1] == 1 + (SIZE // 16)**2
    assert torch.allclose(feature, backbone.ln2(tokens[:, 1:].mean(1)), atol=1e-5)


def test_vit_reads_the_class_token():
    """It gets no prompt itself, so the last block has none: nothing would read it."""
    cfg = load('protune', 'vit-t', 'dtd')
    option = 'model.backbone.backbone.out_type=cls_token'
    assert option in (CONFIGS / 'README.md').read_text()
    cfg.merge_from_dict(dict([option.split('=')]))
    model = build(cfg).eval()
    assert list(model.backbone.prompts) == [f'branch{i}' for i in range(1, 23)]
    assert min(gradients(model).values()) > 0

    caught = []
    model.backbone.backbone.ln1.register_forward_hook(lambda m, args, out: caught.append(out))
    feature, = model.extract_feat(torch.randn(2, 3, SIZE, SIZE))
    assert torch.equal(feature, caught[0][:, 0])

    # At stage ends it is seen as well that a fourth one would never learn.
    cfg.model.backbone.insert = 'stages'
    found = gradients(build(cfg))
    assert list(found) == ['stage1', 'stage2', 'stage3'] and min(found.values()) > 0


def test_the_class_token_itself_gets_no_prompt():
    model = build(load('protune', 'vit-t', 'dtd'))
    for stage in model.backbone.stages:
        block = model.backbone.prompts[stage.name]
        torch.nn.init.ones_(block.expand.bias)
        x = torch.randn(2, 1 + (SIZE // 16)**2, 192)
        with calls.opened(model.backbone, calls.Call((SIZE, SIZE))):
            prompted = model.backbone.apply_prompt(stage, x)
        assert torch.equal(prompted[:, 0], x[:, 0])
        assert torch.allclose(prompted[:, 1:], x[:, 1:] + 1, atol=1e-5)
