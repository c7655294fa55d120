"""One process, CPU processes and launchers."""
from __future__ import annotations

import os

import pytest
import torch
from mmcv.ops import SyncBatchNorm as MMCVSyncBatchNorm
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed, nn

from mmprotune.engine import processes
from mmprotune.engine.config import protune
from mmprotune.engine.processes import CPU_WRAPPER, prepare_processes
from mmprotune.engine.runner import build_runner
from mmprotune.errors import LaunchError

SYNC = dict(type='SyncBN', requires_grad=True)
MMCV_SYNC = dict(type='MMSyncBN', stats_mode='N', requires_grad=True)


@pytest.fixture
def gloo(tmp_path):
    """A gloo group of this process alone."""
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


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
    assert prepare_processes(cfg) == []
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
        cfg = protune(cfg)
        cfg.model.backbone['freeze'] = 'all'  # addict has a method of that name
    cfg.update(work_dir=str(tmp_path), default_scope='mmseg', experiment_name=f'{tmp_path.name}')
    runner = build_runner(cfg)
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
    notice, = prepare_processes(cfg)
    assert 'SyncBN in the config: reverted to BatchNorm' in notice
    # mmcv's cannot even be built without a group.
    expected = kind if kind is nn.SyncBatchNorm else 'SyncBN'
    assert cfg.model.backbone.norm_cfg.type == expected


def test_sync_bn_on_gpus_stays(on_gpu):
    cfg = segmentor(MMCV_SYNC)
    cfg.launcher = 'pytorch'
    before = cfg.pretty_text
    assert prepare_processes(cfg) == []
    assert cfg.pretty_text == before


def test_cpu_processes(on_cpu, gloo):
    cfg = segmentor(MMCV_SYNC)
    cfg.update(launcher='pytorch', sync_bn='torch', find_unused_parameters=True)
    notices = prepare_processes(cfg)
    assert any('gloo' in notice for notice in notices)
    assert any('MMSyncBN, sync_bn=torch' in notice for notice in notices)
    assert cfg.sync_bn is None
    assert cfg.model_wrapper_cfg == dict(
        type='mmprotune.CPUDistributedDataParallel', device_ids=None, broadcast_buffers=False,
        find_unused_parameters=True)


def test_config_of_a_cpu_run_goes_on_gpus(on_gpu):
    cfg = Config(dict(
        launcher='pytorch', model=dict(type='A'),
        model_wrapper_cfg=dict(type=CPU_WRAPPER, device_ids=None)))
    prepare_processes(cfg)
    assert cfg.model_wrapper_cfg is None


def test_cpu_processes_keep_another_wrapper(on_cpu, gloo):
    cfg = Config(dict(
        launcher='pytorch', model=dict(type='A'),
        model_wrapper_cfg=dict(type='MMSeparateDistributedDataParallel')))
    prepare_processes(cfg)
    assert cfg.model_wrapper_cfg == dict(
        type='MMSeparateDistributedDataParallel', device_ids=None)


def test_cpu_wrapper_reverts_sync_bn(gloo):
    """In a model, as the code of some hosts makes it the default, no config tells of it."""
    from mmcv.ops import SyncBatchNorm
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), SyncBatchNorm(4))
    params = list(model.parameters())
    # As the Runner builds it, from any host's scope.
    wrapped = MODEL_WRAPPERS.build(
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
    with pytest.raises(LaunchError, match=f'--launcher {launcher}: .*RANK|.*PROCID'):
        prepare_processes(Config(dict(launcher=launcher, model=dict(type='A'))))


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
        processes.torch_dist, 'init_process_group',
        lambda backend, **kwargs: calls.append((backend, kwargs['timeout'].total_seconds())))
    prepare_processes(
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
    monkeypatch.setattr(processes, 'rendezvous', lambda url: iter([(common, 1, 4)]))
    monkeypatch.setattr(processes.torch_dist, 'init_process_group',
                        lambda backend, **kwargs: calls.append((backend, kwargs)))
    prepare_processes(Config(dict(launcher='pytorch', model=dict(type='A'))))
    (backend, kwargs), = calls
    assert backend == 'gloo'
    if key is None:
        assert 'store' not in kwargs
    else:
        assert (kwargs['rank'], kwargs['world_size']) == (1, 4)
        kwargs['store'].set('key', 'value')
        assert common.get(key) == b'value'
