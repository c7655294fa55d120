"""The shell launchers: their arguments, and two CPU processes that really train and evaluate."""
from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import stat
import subprocess
import sys

import pytest

from mmprotune import checkpoint

from .conftest import REPO

TOOLS = REPO / 'tools'
SCRIPTS = ('dist_train.sh', 'dist_test.sh', 'slurm_train.sh', 'slurm_test.sh')


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def fake_python(tmp_path) -> str:
    """An interpreter that prints its arguments, one a line."""
    return str(
        executable(
            tmp_path / 'fake_python', '#!/bin/sh\n'
            'printf "%s\\n" "$@"\necho "PYTHONPATH=$PYTHONPATH"\n'))


@pytest.fixture
def fake_srun(tmp_path) -> pathlib.Path:
    """A Slurm of one node: starts the tasks as srun does, and notes its own arguments."""
    return executable(
        tmp_path / 'srun', """#!/bin/bash
printf '%s\\n' "$@" > "$SRUN_LOG"
tasks=1
while [[ $1 == -* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
pids=()
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=$tasks SLURM_NODELIST=localhost "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
""")


@pytest.mark.parametrize('script', SCRIPTS)
def test_usage(run_command, script):
    done = run_command('bash', TOOLS / script, 'config.py')
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ')
    assert script in done.stderr
    assert done.stdout == ''


@pytest.mark.parametrize('gpus', ['0', 'two', '--work-dir'])
def test_number_of_processes_is_checked(run_command, gpus):
    assert run_command('bash', TOOLS / 'dist_train.sh', 'config.py', gpus).returncode == 2
    assert run_command('bash', TOOLS / 'dist_test.sh', 'config.py', 'a.pth', gpus).returncode == 2


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
@pytest.mark.parametrize('script', [*SCRIPTS, 'torchrun.sh', 'srun.sh'])
def test_shellcheck(script):
    done = subprocess.run(['shellcheck', str(TOOLS / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', SCRIPTS)
def test_is_executable(script):
    assert (TOOLS / script).stat().st_mode & stat.S_IXUSR


def test_arguments_of_dist_train(run_command, fake_python):
    done = run_command(
        'bash', TOOLS / 'dist_train.sh', 'my config.py', '4', '--cfg-options', 'a=[(1, 2)]',
        NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='29512', PYTHON=fake_python)
    *lines, path = done.stdout.splitlines()
    assert lines == [
        '-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1',
        '--master_port=29512', '--nproc_per_node=4', str(TOOLS / 'train.py'), 'my config.py',
        '--launcher', 'pytorch', '--cfg-options', 'a=[(1, 2)]']
    assert path.startswith(f'PYTHONPATH={REPO}')


def test_arguments_of_dist_test(run_command, fake_python):
    done = run_command(
        'bash', TOOLS / 'dist_test.sh', 'c.py', 'a.pth', '1', '--tta', PYTHON=fake_python)
    lines = done.stdout.splitlines()
    assert lines[lines.index('--nproc_per_node=1') + 1:-1] == [
        str(TOOLS / 'test.py'), 'c.py', 'a.pth', '--launcher', 'pytorch', '--tta']


def test_ports(run_command, fake_python):
    """One machine: any free one. Several: they must agree without being told."""

    def arguments(**env: str) -> list[str]:
        done = run_command('bash', TOOLS / 'dist_train.sh', 'c.py', '2', PYTHON=fake_python, **env)
        return done.stdout.splitlines()

    assert '--rdzv_endpoint=127.0.0.1:0' in arguments()
    assert '--rdzv_endpoint=127.0.0.1:29512' in arguments(PORT='29512')
    assert '--master_port=29500' in arguments(NNODES='2')


def test_arguments_of_slurm(run_command, fake_python, fake_srun, tmp_path):
    log = tmp_path / 'srun.log'
    env = dict(PATH=f'{tmp_path}:/usr/bin:/bin', PYTHON=fake_python, SRUN_LOG=str(log))
    done = run_command(
        'bash', TOOLS / 'slurm_train.sh', 'part', 'job', 'my config.py', 'out', '--amp', GPUS='2',
        CPUS_PER_TASK='3', SRUN_ARGS='--time=1 --quiet', **env)
    assert done.returncode == 0, done.stderr
    command = [
        fake_python, '-u', str(TOOLS / 'train.py'), 'my config.py', '--work-dir', 'out',
        '--launcher', 'slurm', '--amp']
    assert log.read_text().splitlines() == [
        '--partition=part', '--job-name=job', '--ntasks=2', '--gres=gpu:2', '--ntasks-per-node=2',
        '--cpus-per-task=3', '--kill-on-bad-exit=1', '--time=1', '--quiet', *command]

    run_command('bash', TOOLS / 'slurm_test.sh', 'part', 'job', 'c.py', 'a.pth', GPUS='16', **env)
    lines = log.read_text().splitlines()
    assert {'--ntasks=16', '--gres=gpu:8', '--ntasks-per-node=8'} < set(lines)
    assert lines[-6:] == ['-u', str(TOOLS / 'test.py'), 'c.py', 'a.pth', '--launcher', 'slurm']


def test_two_processes_train_and_evaluate(project, run_command, tmp_path):
    done = run_command(
        'bash', TOOLS / 'dist_train.sh', project.prompted, '2', '--work-dir', 'run',
        '--cfg-options', 'train_cfg.val_interval=1')
    assert done.returncode == 0, done.stderr
    assert 'talk over gloo' in done.stdout
    # Four images, two processes.
    saved = tmp_path / 'run' / 'epoch_1.pth'
    assert checkpoint.read(saved)['meta']['iter'] == 2

    done = run_command(
        'bash', TOOLS / 'dist_test.sh', project.prompted, saved, '2', '--work-dir', 'tested')
    assert done.returncode == 0, done.stderr
    tested = json.loads(next(tmp_path.glob('tested/*/*.json')).read_text())
    scalars = next(tmp_path.glob('run/*/vis_data/scalars.json')).read_text()
    validated = json.loads(scalars.splitlines()[-1])
    assert validated['coco/segm_mAP'] == tested['coco/segm_mAP']


def test_two_processes_of_slurm(project, run_command, fake_srun, tmp_path):
    with socket.socket() as probe:
        probe.bind(('', 0))
        port = probe.getsockname()[1]
    done = run_command(
        'bash', TOOLS / 'slurm_train.sh', 'part', 'job', project.prompted, 'run', GPUS='2',
        GPUS_PER_NODE='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
        SRUN_LOG=str(tmp_path / 'log'), PATH=f'{tmp_path}:/usr/bin:/bin')
    assert done.returncode == 0, done.stderr
    assert '--gres' not in (tmp_path / 'log').read_text()
    assert checkpoint.read(tmp_path / 'run' / 'epoch_1.pth')['meta']['iter'] == 2


@pytest.mark.parametrize('arguments', [['--part', '0'], ['--part', '99'], ['--part', '1,99'],
                                       ['--part', 'all'],
                                       ['--device', 'tpu'], ['--help', '1']], ids=' '.join)
def test_gpu_check_says_how_it_is_called(arguments):
    done = subprocess.run(['bash', str(REPO / 'tools/gpu_check.sh'), *arguments],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'usage: gpu_check.sh' in done.stderr


def test_gpu_check_goes_on_where_it_was(tmp_path):
    """A part that is marked as done is not run again, and one that fails is told."""
    env = dict(os.environ, MMPROTUNE_ENV='current', PYTHON=sys.executable)
    call = ['bash', str(REPO / 'tools/gpu_check.sh'), '--device', 'cpu', '--out', str(tmp_path)]
    for part in range(1, 23):
        (tmp_path / f'{part}.done').touch()
    (tmp_path / 'ablation.json').mkdir()  # so that the last one cannot write its figures
    done = subprocess.run(call, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 1 and done.stdout.count('done before') == 22
    assert 'failed: 23 (ablation)' in done.stderr and not (tmp_path / '23.done').exists()
