from __future__ import annotations

import sys

import pytest
import torch

from mmprotune import checkpoint
from mmprotune.engine import cli
from mmprotune.errors import LaunchError

from .conftest import load_tool

train = load_tool('train.py')


def run(capsys, *argv: str) -> tuple[int, str]:
    """Exit status and what stands on stderr."""
    capsys.readouterr()
    status = cli.run_tool(lambda: train.main([str(arg) for arg in argv]))
    return status, capsys.readouterr().err


def test_flags():
    args = train.parse_args([
        'a.py', '--work-dir', 'w', '--amp', '--auto-scale-lr', '--resume', '--launcher', 'slurm',
        '--local-rank', '1', '--protune', '--cfg-options', 'a.b=1,2', 'c=x'])
    assert (args.config, args.work_dir, args.launcher, args.local_rank) == ('a.py', 'w', 'slurm', 1)
    assert args.amp
    assert args.auto_scale_lr
    assert args.protune
    assert args.resume == 'auto'
    assert args.cfg_options == {'a.b': [1, 2], 'c': 'x'}
    assert train.parse_args(['a.py', '--local_rank', '2', '--resume', 'x.pth']).resume == 'x.pth'
    assert train.parse_args(['a.py']).resume is None


def test_writes_a_slim_checkpoint(trained):
    content = checkpoint.read(trained)
    assert content['meta']['iter'] == 4
    keys = content['state_dict'].keys()
    assert any(key.startswith('backbone.prompts.') for key in keys)
    assert not any(key.startswith('backbone.backbone.') for key in keys)


def test_resumes_from_the_work_directory(project, trained, tmp_path):
    work_dir = tmp_path / 'run'
    options = ['--work-dir', str(work_dir), '--cfg-options', 'train_cfg.max_epochs=2']
    (work_dir).mkdir()
    (work_dir / 'last_checkpoint').write_text(trained)
    train.main([project.prompted, '--resume', *options])
    # One epoch more, not two.
    assert not (work_dir / 'epoch_1.pth').exists()
    assert checkpoint.read(work_dir / 'epoch_2.pth')['meta']['iter'] == 8


def test_resumes_from_a_file(project, trained, tmp_path):
    train.main([
        project.prompted, '--resume', trained, '--work-dir',
        str(tmp_path), '--cfg-options', 'train_cfg.max_epochs=2'])
    assert checkpoint.read(tmp_path / 'epoch_2.pth')['meta']['iter'] == 8


def test_protune_wraps_a_stock_config(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main([project.stock, '--protune', '--cfg-options', 'model.backbone.freeze=all'])
    content = checkpoint.read(tmp_path / 'work_dirs' / 'stock_protune' / 'epoch_1.pth')
    assert content['meta']['mmprotune']['backbones'].keys() == {'backbone'}
    assert not any(key.startswith('backbone.backbone.') for key in content['state_dict'])


def test_stock_config_trains_as_it_is(project, tmp_path):
    train.main([project.stock, '--work-dir', str(tmp_path), '--auto-scale-lr'])
    content = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert 'backbone.layer1.0.conv1.weight' in content['state_dict']
    # Batch 1 instead of 16.
    assert content['optimizer']['param_groups'][0]['initial_lr'] == pytest.approx(2e-4 / 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is there')
def test_amp_without_gpu(project, tmp_path, capsys):
    status, message = run(capsys, project.prompted, '--work-dir', tmp_path, '--amp')
    assert status == 1
    assert '--amp needs a GPU' in message


@pytest.mark.parametrize('option', ['--resume', '--cfg-options'])
def test_truncated_checkpoint(project, trained, tmp_path, capsys, option):
    broken = tmp_path / 'broken.pth'
    with open(trained, 'rb') as file:
        broken.write_bytes(file.read(100_000))
    value = str(broken) if option == '--resume' else f'load_from={broken}'
    status, message = run(
        capsys, project.prompted, '--work-dir', tmp_path / 'run', option, value)
    assert status == 1
    assert 'broken.pth' in message
    assert 'truncated' in message
    assert 'Traceback' not in message


def test_missing_checkpoint(project, tmp_path, capsys):
    for option, value in (('--resume', 'none.pth'), ('--cfg-options', 'load_from=none.pth')):
        status, message = run(capsys, project.prompted, '--work-dir', tmp_path, option, value)
        assert status == 1
        assert "no file 'none.pth'" in message


def test_no_pretrained_file(project, tmp_path, capsys):
    status, message = run(capsys, project.stock, '--protune', '--work-dir', tmp_path)
    assert status == 1
    assert "freeze='all'" in message
    assert 'Traceback' not in message


@pytest.mark.parametrize('flag', [[], ['--protune']])
def test_missing_pretrained_file(project, tmp_path, capsys, flag):
    status, message = run(capsys, project.stock, *flag, '--work-dir', tmp_path, '--cfg-options',
                          'model.backbone.pretrained=none.pth')
    assert status == 1
    assert "error: model.backbone.pretrained: no file 'none.pth'" in message
    assert 'Traceback' not in message


def test_registry_errors_are_the_hosts(project, tmp_path):
    with pytest.raises(KeyError, match='NoSuchNet is not in the mmdet::model registry'):
        train.main([
            project.prompted, '--work-dir',
            str(tmp_path), '--cfg-options', 'model.backbone.backbone.type=NoSuchNet'])


def test_data_errors_are_the_hosts(project, tmp_path):
    key = 'train_dataloader.dataset.'
    with pytest.raises(FileNotFoundError, match='none.json'):
        train.main([
            project.prompted, '--work-dir',
            str(tmp_path), '--cfg-options', f'{key}ann_file=none.json'])
    # Classes that no annotation has leave no image to train on; the host says so.
    with pytest.raises((ValueError, AssertionError)):
        train.main([
            project.prompted, '--work-dir',
            str(tmp_path), '--cfg-options', f'{key}metainfo.classes=giraffe,',
            f'{key}filter_cfg.filter_empty_gt=True'])


def test_traceback_on_demand(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('MMPROTUNE_DEBUG', '1')
    with pytest.raises(LaunchError, match='no file'):
        run(capsys, project.prompted, '--work-dir', tmp_path, '--resume', 'none.pth')


def test_from_the_command_line(run_command):
    done = run_command(sys.executable, load_tool('train.py').__file__, 'none.py')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "train.py: error: config: no file 'none.py'"
    assert 'Traceback' not in done.stderr
