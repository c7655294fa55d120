from __future__ import annotations

import argparse
import importlib
import logging
import os
import pkgutil
from urllib.error import URLError

import pytest
import torch
from mmcv.ops import SyncBatchNorm as MMCVSyncBatchNorm
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import PretrainedInit
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import distributed, nn

import mmprotune
from mmprotune.checkpoint import CheckpointError
from mmprotune.datasets.checked import DataError
from mmprotune.engine import cli
from mmprotune.models import PromptedBackbone

SYNC = dict(type='SyncBN', requires_grad=True)
MMCV_SYNC = dict(type='MMSyncBN', stats_mode='N', requires_grad=True)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(cli, 'get_device', lambda: 'cpu')


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(cli, 'get_device', lambda: 'cuda')


@pytest.fixture
def gloo(tmp_path):
    """A gloo group of this process alone."""
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# --- configs --------------------------------------------------------------------------------------


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
    ('mmnothing::a/b.py', "the package 'mmnothing' is not installed"),
])
def test_load_config_refuses(name, message):
    with pytest.raises(cli.LaunchError, match=message):
        cli.load_config(name)


def test_wrap_config_names_the_flag():
    with pytest.raises(cli.LaunchError, match='--protune: .*model.backbone'):
        cli.wrap_config(Config(dict(model=dict(type='BERT'))))


def test_wrap_config_knows_the_file_of_the_command_line():
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet')), load_from='old.pth'))
    assert cli.wrap_config(cfg, {'load_from': 'new.pth'}).model.backbone.frozen_from == 'new.pth'


@pytest.mark.parametrize(('config', 'given', 'in_config', 'expected'), [
    ('a/b.py', None, None, os.path.join('work_dirs', 'b_x')),
    ('mmdet::a/b.py', None, None, os.path.join('work_dirs', 'b_x')),
    ('a/b.py', None, 'own', 'own'),
    ('a/b.py', 'given', 'own', 'given'),
])
def test_work_dir(config, given, in_config, expected):
    cfg = Config(dict(work_dir=in_config))
    cli.set_work_dir(cfg, argparse.Namespace(config=config, work_dir=given), suffix='_x')
    assert cfg.work_dir == expected


def test_without_pretrained():
    file = dict(type='Pretrained', checkpoint='torchvision://resnet50')
    other = dict(type='Xavier', layer='Linear')
    stock = Config(dict(
        model=dict(
            pretrained='open-mmlab://resnet50_v1c',
            backbone=dict(
                type='mmprotune.PromptedBackbone', backbone=dict(type='ResNet', init_cfg=file)),
            heads=[dict(type='Head', init_cfg=[file, other]), dict(type='H', init_cfg=other)]),
        load_from='x.pth'))
    cfg = cli.without_pretrained(stock)
    assert 'Pretrained' not in cfg.pretty_text
    assert 'resnet50_v1c' not in cfg.pretty_text
    assert cfg.model.backbone['freeze'] == 'all'
    assert cfg.model.heads == [dict(type='Head', init_cfg=[other]), dict(type='H', init_cfg=other)]
    assert cfg.load_from == 'x.pth'
    assert stock.model.backbone.backbone.init_cfg == file


def test_without_pretrained_of_classes_and_whole_models():
    file = dict(type=PretrainedInit, checkpoint='x.pth')
    cfg = cli.without_pretrained(Config(dict(model=dict(
        init_cfg=dict(file),
        backbone=dict(type=PromptedBackbone, frozen_from='y.pth',
                      backbone=dict(type='ResNet', init_cfg=[file])),))))
    assert 'x.pth' not in str(cfg) and 'y.pth' not in str(cfg)
    assert cfg.model.backbone['freeze'] == 'all'


# --- flags ----------------------------------------------------------------------------------------


def test_resume_from_a_file(tmp_path):
    file = tmp_path / 'a.pth'
    file.touch()
    cfg = Config(dict(work_dir=str(tmp_path), load_from='weights.pth', resume=False))
    cli.set_resume(cfg, str(file))
    assert (cfg.resume, cfg.load_from) == (True, str(file))


def test_resume_auto(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), load_from='weights.pth', resume=False))
    cli.set_resume(cfg, 'auto')
    # Nothing to resume: what the config said stays.
    assert (cfg.resume, cfg.load_from) == (False, 'weights.pth')

    newest = tmp_path / 'epoch_2.pth'
    torch.save(dict(optimizer={}), newest)
    (tmp_path / 'last_checkpoint').write_text(str(newest))
    cli.set_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (True, str(newest))


def test_resume_from_nothing(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path)))
    with pytest.raises(cli.LaunchError, match='--resume: no file'):
        cli.set_resume(cfg, str(tmp_path / 'none.pth'))
    cli.set_resume(cfg, None)
    assert 'resume' not in cfg
    cli.check_checkpoint_path('load_from', 'https://example.org/a.pth')  # not a local file


def test_amp(on_gpu):
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper')))
    cli.use_amp(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale=512.)))
    cli.use_amp(cfg)
    assert cfg.optim_wrapper.loss_scale == 512.
    with pytest.raises(cli.LaunchError, match="optim_wrapper.type must be .* got 'Own'"):
        cli.use_amp(Config(dict(optim_wrapper=dict(type='Own'))))


def test_amp_of_a_class(on_gpu):
    cfg = Config(dict(optim_wrapper=dict(type=OptimWrapper)))
    cli.use_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'


def test_amp_without_gpu(on_cpu):
    with pytest.raises(cli.LaunchError, match='--amp needs a GPU'):
        cli.use_amp(Config(dict(optim_wrapper=dict(type='OptimWrapper'))))


def test_auto_scale_lr():
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    cli.use_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True
    for without in (dict(), dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(cli.LaunchError, match='auto_scale_lr.base_batch_size'):
            cli.use_auto_scale_lr(Config(without))


# --- processes ------------------------------------------------------------------------------------


def segmentor(norm_cfg: dict) -> Config:
    return Config(dict(
        launcher='none',
        model=dict(
            type='mmseg.EncoderDecoder',
            backbone=dict(type='mmseg.ResNet', depth=18, base_channels=8, norm_cfg=norm_cfg),
            decode_head=dict(
                type='mmseg.FCNHead', in_channels=64, channels=8, num_classes=2,
                norm_cfg=norm_cfg))))


def test_plain_config_is_left_alone(on_cpu):
    cfg = segmentor(dict(type='BN', requires_grad=True))
    before = cfg.pretty_text
    assert cli.prepare_processes(cfg) == []
    assert cfg.pretty_text == before


@pytest.mark.parametrize('norm_cfg', [SYNC, MMCV_SYNC], ids=lambda cfg: cfg['type'])
@pytest.mark.parametrize('prompted', [False, True])
def test_sync_bn_in_one_process(tmp_path, norm_cfg, prompted):
    """From the config to a training step, as the Runner goes there."""
    pytest.importorskip('mmseg')
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    cfg = segmentor(norm_cfg)
    if prompted:
        cfg = cli.wrap_config(cfg)
        cfg.model.backbone['freeze'] = 'all'  # addict has a method of that name
    cfg.update(work_dir=str(tmp_path), default_scope='mmseg', experiment_name=f'{tmp_path.name}')
    runner = cli.build_runner(cfg)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert f'{norm_cfg["type"]} in the config: reverted to BatchNorm' in log

    model = runner.model.train()
    assert not any('Sync' in type(module).__name__ for module in model.modules())
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 32, 32, dtype=torch.long)))
    losses = model.loss(torch.randn(2, 3, 32, 32), [sample, sample.clone()])
    sum(value for name, value in losses.items() if 'loss' in name).backward()
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trainable
    assert any(name.startswith('backbone.backbone') for name in trainable) is False
    assert [n for n in trainable if model.get_parameter(n).grad is None] == []


@pytest.mark.parametrize('kind', [nn.SyncBatchNorm, MMCVSyncBatchNorm])
def test_sync_bn_classes_in_one_process(kind):
    cfg = segmentor(dict(type=kind))
    notice, = cli.prepare_processes(cfg)
    assert 'SyncBN in the config: reverted to BatchNorm' in notice
    # mmcv's cannot even be built without a group.
    expected = kind if kind is nn.SyncBatchNorm else 'SyncBN'
    assert cfg.model.backbone.norm_cfg.type == expected


def test_sync_bn_on_gpus_stays(on_gpu):
    cfg = segmentor(MMCV_SYNC)
    cfg.launcher = 'pytorch'
    before = cfg.pretty_text
    assert cli.prepare_processes(cfg) == []
    assert cfg.pretty_text == before


def test_cpu_processes(on_cpu, gloo):
    cfg = segmentor(MMCV_SYNC)
    cfg.update(launcher='pytorch', sync_bn='torch', find_unused_parameters=True)
    notices = cli.prepare_processes(cfg)
    assert any('gloo' in notice for notice in notices)
    assert any('MMSyncBN, sync_bn=torch' in notice for notice in notices)
    assert cfg.sync_bn is None
    assert cfg.model_wrapper_cfg == dict(
        type='mmprotune.CPUDistributedDataParallel', device_ids=None, broadcast_buffers=False,
        find_unused_parameters=True)


def test_config_of_a_cpu_run_goes_on_gpus(on_gpu):
    cfg = Config(dict(
        launcher='pytorch', model=dict(type='A'),
        model_wrapper_cfg=dict(type=cli.CPU_WRAPPER, device_ids=None)))
    cli.prepare_processes(cfg)
    assert cfg.model_wrapper_cfg is None


def test_cpu_processes_keep_another_wrapper(on_cpu, gloo):
    cfg = Config(dict(
        launcher='pytorch', model=dict(type='A'),
        model_wrapper_cfg=dict(type='MMSeparateDistributedDataParallel')))
    cli.prepare_processes(cfg)
    assert cfg.model_wrapper_cfg == dict(
        type='MMSeparateDistributedDataParallel', device_ids=None)


def test_cpu_wrapper_reverts_sync_bn(gloo):
    """In a model, as the code of some hosts makes it the default, no config tells of it."""
    from mmcv.ops import SyncBatchNorm
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), SyncBatchNorm(4))
    params = list(model.parameters())
    # As the Runner builds it, from any host's scope.
    wrapped = cli.ROOT_MODEL_WRAPPERS.build(
        dict(type='mmprotune.CPUDistributedDataParallel', module=model, device_ids=[0],
             broadcast_buffers=False))
    assert wrapped.device_ids is None
    assert not any('Sync' in type(module).__name__ for module in wrapped.modules())
    assert all(a is b for a, b in zip(wrapped.parameters(), params))
    wrapped.train()(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert all(param.grad is not None for param in params)


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_started_without_the_launcher(on_cpu, monkeypatch, launcher):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(cli.LaunchError, match=f'--launcher {launcher}: .*RANK|.*PROCID'):
        cli.prepare_processes(Config(dict(launcher=launcher, model=dict(type='A'))))


@pytest.mark.parametrize(('launcher', 'prefix', 'names'), [
    ('slurm', 'SLURM_', ('PROCID', 'NTASKS', 'LOCALID')),
    ('mpi', 'OMPI_COMM_WORLD_', ('RANK', 'SIZE', 'LOCAL_RANK')),
])
def test_environment_of_launchers(on_cpu, monkeypatch, launcher, prefix, names):
    ours = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
    for name in (*ours, 'MASTER_PORT'):
        monkeypatch.setenv(name, 'stale')  # so that monkeypatch puts back what was there
    monkeypatch.delenv('MASTER_PORT')
    monkeypatch.setenv('MASTER_ADDR', 'node7')
    for name, value in zip(names, ('3', '8', '1')):
        monkeypatch.setenv(prefix + name, value)
    calls = []
    monkeypatch.setattr(
        cli.torch_dist, 'init_process_group',
        lambda backend, **kwargs: calls.append((backend, kwargs['timeout'].total_seconds())))
    cli.prepare_processes(
        Config(dict(
            launcher=launcher, model=dict(type='A'),
            env_cfg=dict(dist_cfg=dict(backend='nccl', port=1234, timeout=60)))))
    assert calls == [('gloo', 60)]
    assert [os.environ[name] for name in ours] == ['3', '8', '1']
    assert os.environ['MASTER_PORT'] == '1234'


@pytest.mark.parametrize(('agents', 'restarts', 'key'), [
    ('1', '0', None), ('1', '2', 'attempt_2/key'), ('2', '2', None)])
def test_each_attempt_has_keys_of_its_own(on_cpu, monkeypatch, agents, restarts, key):
    """torchrun on one machine hands every attempt the same store."""
    for name, value in dict(RANK='1', WORLD_SIZE='4', LOCAL_RANK='1', MASTER_ADDR='127.0.0.1',
                            MASTER_PORT='1234', GROUP_WORLD_SIZE=agents,
                            TORCHELASTIC_RESTART_COUNT=restarts).items():
        monkeypatch.setenv(name, value)
    common, calls = distributed.HashStore(), []
    monkeypatch.setattr(cli, 'rendezvous', lambda url: iter([(common, 1, 4)]))
    monkeypatch.setattr(cli.torch_dist, 'init_process_group',
                        lambda backend, **kwargs: calls.append((backend, kwargs)))
    cli.prepare_processes(Config(dict(launcher='pytorch', model=dict(type='A'))))
    (backend, kwargs), = calls
    assert backend == 'gloo'
    if key is None:
        assert 'store' not in kwargs
    else:
        assert (kwargs['rank'], kwargs['world_size']) == (1, 4)
        kwargs['store'].set('key', 'value')
        assert common.get(key) == b'value'


# --- building the Runner --------------------------------------------------------------------------


def test_data_loaders_of_mmpretrain():
    cfg = Config(dict(
        train_dataloader=dict(batch_size=2, num_workers=2),
        val_dataloader=dict(num_workers=0, pin_memory=False), test_dataloader=None))
    cli._set_dataloader_defaults(cfg)
    collate = dict(type='default_collate')
    assert cfg.train_dataloader == dict(
        batch_size=2, num_workers=2, pin_memory=True, persistent_workers=True, collate_fn=collate)
    assert cfg.val_dataloader == dict(
        num_workers=0, pin_memory=False, persistent_workers=False, collate_fn=collate)
    assert cfg.test_dataloader is None


def test_frozen_parameters_are_told_of_once():
    logger = MMLogger.get_instance('test_frozen_parameters_are_told_of_once')
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    logger.addFilter(cli._OneFrozenNotice())

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[:2].requires_grad_(False)
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='SGD', lr=1., weight_decay=1.),
        paramwise_cfg=dict(bias_decay_mult=0.)))
    optimized = {id(param) for group in wrapper.param_groups for param in group['params']}
    assert {id(param) for param in model.parameters()} & optimized == {
        id(param) for param in model[2].parameters()}
    assert [line for line in lines if 'frozen' in line[1]] == [
        ('INFO', 'optimizer: frozen parameters are left out')]
    assert not any('skipped' in message for _, message in lines)
    assert any('paramwise_options' in message for _, message in lines)


# --- errors ---------------------------------------------------------------------------------------


def exceptions_of_the_package() -> list[type]:
    found = []
    for module in pkgutil.walk_packages(mmprotune.__path__, 'mmprotune.'):
        content = vars(importlib.import_module(module.name))
        found += [value for value in content.values() if isinstance(value, type)
                  and issubclass(value, Exception) and value.__module__ == module.name]
    assert {CheckpointError, DataError, mmprotune.FrozenTensorsChanged} < {*found}
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


def test_downloads_that_fail(monkeypatch, capsys, tmp_path):

    def main():
        raise URLError('no route')

    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    assert cli.run_tool(main) == 1
    message = capsys.readouterr().err
    assert 'could not be downloaded: <urlopen error no route>' in message
    assert str(tmp_path / 'checkpoints') in message


def test_other_errors_pass():
    with pytest.raises(KeyError, match='host'):
        cli.run_tool(lambda: {}['host'])
    assert cli.run_tool(lambda: None) == 0


def test_group_is_left_at_the_end(tmp_path):
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    assert cli.run_tool(lambda: None) == 0
    assert not distributed.is_initialized()
