"""Arguments, configs and errors of the command-line tools."""
from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import runpy
import sys
import types
import weakref
from urllib.error import URLError

import pytest
import torch
from mmengine.config import Config
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import mmprotune
from mmprotune.engine import cli
from mmprotune.errors import (
    CheckpointError,
    DataError,
    FrozenTensorsChanged,
    LaunchError,
)
from mmprotune.registry import DATASETS, TRANSFORMS
from tests.conftest import RESNET18, build


@pytest.mark.parametrize('suffix', ['', '.py'])
def test_load_config_by_name(suffix):
    cfg = cli.load_config(f'mmdet::retinanet/retinanet_r50_fpn_1x_coco{suffix}')
    assert cfg.model.type == 'RetinaNet'


def test_load_config_by_path(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('answer = 42')
    assert cli.load_config(str(path)).answer == 42


@pytest.mark.parametrize(('name', 'message'), [
    ('no/such_file.py', "no file 'no/such_file.py'"),
    ('mmdet::retinanet/no_such.py', "not shipped by 'mmdet'"),
    ('mmdet::no_folder.py', 'expected package::folder/file.py'),
    ('mmnothing::a/b.py', "the package 'mmnothing' is not installed"),
])
def test_load_config_refuses(name, message):
    with pytest.raises(LaunchError, match=message):
        cli.load_config(name)


def test_wrap_config_names_the_flag():
    with pytest.raises(LaunchError, match='--protune: .*model.backbone'):
        cli.wrap_config(Config(dict(model=dict(type='BERT'))))


def test_wrap_config_knows_the_file_of_the_command_line():
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet')), load_from='old.pth'))
    assert cli.wrap_config(cfg, {'load_from': 'new.pth'}).model.backbone.frozen_from == 'new.pth'


@pytest.mark.parametrize(('config', 'given', 'in_config', 'expected'), [
    ('a/b.py', None, None, os.path.join('work_dirs', 'b_protune')),
    ('mmdet::a/b.py', None, None, os.path.join('work_dirs', 'b_protune')),
    ('a/b.py', None, 'own', 'own'),
    ('a/b.py', 'given', 'own', 'given'),
])
def test_work_dir(config, given, in_config, expected):
    cfg = Config(dict(work_dir=in_config))
    cli.set_work_dir(cfg, argparse.Namespace(config=config, work_dir=given, protune=True))
    assert cfg.work_dir == expected


def test_an_address_is_no_local_file():
    cli.check_checkpoint_path('load_from', 'https://example.org/a.pth')
    with pytest.raises(LaunchError, match="load_from: no file 'no/a.pth'"):
        cli.check_checkpoint_path('load_from', 'no/a.pth')


def exceptions_of_the_package() -> list[type]:
    found = []
    for module in pkgutil.walk_packages(mmprotune.__path__, 'mmprotune.'):
        content = vars(importlib.import_module(module.name))
        found += [value for value in content.values() if isinstance(value, type)
                  and issubclass(value, Exception) and value.__module__ == module.name]
    assert {CheckpointError, DataError, FrozenTensorsChanged} < {*found}
    return found


@pytest.mark.parametrize('kind', exceptions_of_the_package())
def test_errors_without_traceback(monkeypatch, capsys, kind):

    def main():
        raise kind('load_from: what is wrong')

    monkeypatch.delenv('MMPROTUNE_DEBUG', raising=False)
    monkeypatch.setattr('sys.argv', ['somewhere/train.py'])
    assert cli.run_tool(main) == 1
    assert capsys.readouterr().err == 'train.py: error: load_from: what is wrong\n'

    monkeypatch.setenv('MMPROTUNE_DEBUG', '1')
    with pytest.raises(kind, match='what is wrong'):
        cli.run_tool(main)


@pytest.mark.parametrize('options, key', [
    (dict(backbone_dtype='int4'), 'backbone_dtype must be one of'),
    (dict(backbone_dtype='int8', lean=False), 'lean=False'),
    (dict(insert='nowhere'), 'insert must be one of'),
    (dict(stages=3), 'stages must be'),
    (dict(lean=dict(recompute=-1)), 'lean.recompute'),
    (dict(compile=3), 'compile must be'),
    (dict(trainable=['nothing']), "trainable: 'nothing'"),
    (dict(drop_path=True), 'drop_path=True'),
    (dict(prompt=dict(type='mmprotune.PromptBlock', kernel_size=4)), 'prompt.kernel_size'),
    (dict(prompt='PromptBlock'), 'prompt must be None or a dict')])
def test_a_wrong_option_of_a_backbone_is_one_line(options, key, capsys, monkeypatch):
    monkeypatch.delenv('MMPROTUNE_DEBUG', raising=False)
    cfg = dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all', **options)
    assert cli.run_tool(lambda: build(cfg)) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and ': error: ' in lines[0] and key in lines[0]


@pytest.mark.parametrize('build_it, key', [
    (lambda: TRANSFORMS.build(dict(type='mmprotune.Corrupt', corruption='fog', severity=0)),
     'severity must be 1 to 5, got 0'),
    (lambda: DATASETS.build(dict(type='mmprotune.LongTailedDataset', dataset=3)),
     'dataset must be a dataset'),
    (lambda: mmprotune.protune(Config()), 'expected a config with model.backbone')])
def test_a_wrong_option_of_what_is_no_model_is_one_line(build_it, key, capsys, monkeypatch):
    monkeypatch.delenv('MMPROTUNE_DEBUG', raising=False)
    assert cli.run_tool(build_it) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and ': error: ' in lines[0] and key in lines[0]


def test_downloads_that_fail(monkeypatch, capsys, tmp_path):

    def main():
        raise URLError('no route')

    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    assert cli.run_tool(main) == 1
    message = capsys.readouterr().err
    assert 'could not be downloaded: <urlopen error no route>' in message
    assert str(tmp_path / 'checkpoints') in message


@pytest.mark.parametrize('source, cause', [
    ('class BertPreTrainedModel(None): pass', 'NoneType takes no arguments'),  # 4.57 and newer
    ('from json import GenerationMixin', "cannot import name 'GenerationMixin'")])
def test_transformers_that_mmpretrain_does_not_import_with(
        source, cause, capsys, monkeypatch, tmp_path):
    file = tmp_path / 'mmpretrain' / 'models' / 'multimodal' / 'blip.py'
    file.parent.mkdir(parents=True)
    file.write_text(source)
    monkeypatch.delenv('MMPROTUNE_DEBUG', raising=False)
    monkeypatch.setitem(sys.modules, 'transformers', types.SimpleNamespace(__version__='5.24.0'))
    assert cli.run_tool(lambda: runpy.run_path(str(file))) == 1
    line, = capsys.readouterr().err.splitlines()
    assert 'transformers 5.24.0' in line and cause in line and 'transformers<4.52' in line

    other = tmp_path / 'other.py'
    other.write_text(source)
    with pytest.raises((ImportError, TypeError), match=cause):
        cli.run_tool(lambda: runpy.run_path(str(other)))


def test_other_errors_pass():
    with pytest.raises(KeyError, match='host'):
        cli.run_tool(lambda: {}['host'])
    assert cli.run_tool(lambda: None) == 0


def test_group_is_left_at_the_end(tmp_path):
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    assert cli.run_tool(lambda: None) == 0
    assert not distributed.is_initialized()


def test_what_holds_the_group_goes_with_it(tmp_path):
    """Its threads end with its last holder; one that is there when the interpreter ends, may abort
    the process."""

    def main() -> None:
        distributed.init_process_group(
            'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
        wrapper = DistributedDataParallel(torch.nn.Linear(1, 1))
        wrapper.runner = [wrapper]  # a cycle, as a model, its hooks and the Runner are
        holders.append(weakref.ref(wrapper))

    holders = []
    assert cli.run_tool(main) == 0
    assert holders[0]() is None


def test_types_of_inherited_configs_are_the_hosts(tmp_path):
    """MMEngine gives what stands on `mmprotune::…` this package's scope, and lists, too."""
    file = tmp_path / 'config.py'
    file.write_text("steps = [dict(type='PackInputs', _scope_='mmprotune'), "
                    "dict(type='Resize', _scope_='mmdet', inner=dict(type='A', "
                    "_scope_='mmprotune'))]")
    assert cli.load_config(str(file)).steps == [
        dict(type='PackInputs'), dict(type='Resize', _scope_='mmdet', inner=dict(type='A'))]
