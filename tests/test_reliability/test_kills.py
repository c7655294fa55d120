"""Training that is killed at any moment goes on from the newest whole checkpoint, bit by bit.

The processes are real: ``tools/train.py --resume`` with mmdet's Faster R-CNN, AdamW, random
augmentations and an exponential average. SIGKILL comes from outside at a seeded moment, or from
inside a save.
"""
import os
import random
import re
import subprocess

import pytest
import torch

from mmprotune import checkpoint
from tests.detection import detector_cfg

from .models import prompted
from .processes import finish, kill, pipe, start


@pytest.fixture(scope='module', params=[
    pytest.param((3, 4, 8), id='3'), pytest.param((30, 0, 30), id='30', marks=pytest.mark.slow)])
def plan(request):
    """Kills, seed, and epochs (of two iterations) of a run."""
    return request.param


@pytest.fixture(scope='module')
def config(tmp_path_factory, data, resnet18_file, plan):
    folder = tmp_path_factory.mktemp('kills')
    cfg = detector_cfg(prompted(resnet18_file), data, folder)
    cfg.train_cfg.max_epochs = plan[2]
    cfg.custom_hooks += [dict(type='EMAHook', update_buffers=True), dict(type='Beacon')]
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    cfg.default_hooks.logger.interval = 10
    cfg.log_level = 'INFO'
    cfg.dump(str(folder / 'tiny.py'))
    return folder / 'tiny.py'


def train(config, work_dir, log, *options, **how):
    return start('train.py', [config, '--work-dir', work_dir, '--resume', *options], log, **how)


@pytest.fixture(scope='module')
def uninterrupted(config, tmp_path_factory):
    """Folder with the checkpoint of every epoch."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert finish(train(config, folder, folder / 'log', '--cfg-options',
                        'default_hooks.checkpoint.max_keep_ckpts=-1')) == [0], \
        (folder / 'log').read_text()[-3000:]
    return folder


def tensors(value, path=''):
    """All tensors and numbers of a checkpoint that training goes by."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f'{path}/{key}')
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f'{path}/{i}')
    elif isinstance(value, (torch.Tensor, int, float)):
        yield path, torch.as_tensor(value)


def assert_same_training(file, expected):
    parts = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'random_state')
    found, wanted = ({k: v for part in parts for k, v in tensors(content[part], part)}
                     for content in (checkpoint.read(file), checkpoint.read(expected)))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), f'{file.name}: {key}'


def epochs(work_dir):
    return sorted(int(p.stem.rpartition('_')[2]) for p in work_dir.glob('epoch_*.pth'))


def resumed_from(log):
    found = re.findall(r'resumed epoch: (\d+)', log.read_text())
    return int(found[-1]) if found else 0


def attempt(config, work_dir, log, rng):
    """One start that is killed on the way. Returns the exit code."""
    reading, writing = pipe()
    inside = rng.random() < 1 / 3
    die = None
    if inside:
        step = rng.choice(['write', 'write', 'sync', 'rename', 'renamed', 'note'])
        die = step, rng.randint(1, 2), rng.random()
    events = rng.randint(1, 12)
    delay = rng.uniform(0, 0.1)  # about an iteration
    process = train(config, work_dir, log, beacon=writing, die=die)
    writing.close()
    try:
        first = reading.recv()
        # Nobody is saving now. What a killed writer left has been removed.
        assert not list(work_dir.glob('.*')), log.read_text()[-2000:]
        assert first == ('before', 2 * resumed_from(log))
        if not inside:
            for _ in range(events - 1):
                reading.recv()
            process.join(delay)
            process.kill()
        while True:  # until the process is gone, and its end of the pipe with it
            reading.recv()
    except EOFError:
        pass
    finally:
        if process.is_alive() and not inside:
            kill(process)
    return finish(process)[0]


def test_kills(config, uninterrupted, tmp_path, plan):
    """Kills training so many times, over as many runs as that takes, and looks after each."""
    kills, seed, last = plan
    rng = random.Random(seed)
    count = runs = starts = torn = 0
    while count < kills:
        runs += 1
        work_dir = tmp_path / f'run{runs}'
        whole = 0
        while True:
            starts += 1
            log = tmp_path / f'log{starts}'
            if count < kills:
                code = attempt(config, work_dir, log, rng)
            else:
                code, = finish(train(config, work_dir, log))
            assert code in (0, -9), log.read_text()[-3000:]
            # It went on from the newest whole checkpoint that the kill before had left.
            assert resumed_from(log) == whole
            found = epochs(work_dir)
            for epoch in found:  # whole, each of them, and the one to resume from among them
                name = f'epoch_{epoch}.pth'
                assert_same_training(work_dir / name, uninterrupted / name)
            assert max(found, default=0) >= whole
            whole = max(found, default=0)
            if code == 0:
                break
            count += 1
            torn += bool(list(work_dir.glob('.*.tmp')))
        assert whole == last
        assert not list(work_dir.glob('.*'))
    print(f'{count} kills, {torn} of them inside a write: {starts} starts, {runs} runs')
    assert torn  # or the seed is a poor one


# --- a full disk -----------------------------------------------------------------------------


def check_full(config, uninterrupted, work_dir, log, starts):
    """Starts that cannot save: an error that says so, the checkpoint before intact."""
    for process in starts:
        assert finish(process) == [1], log.read_text()[-3000:]
        error = log.read_text().splitlines()[-1]
        assert re.fullmatch(
            r'train\.py: error: \S+/epoch_2\.pth \(\d+ bytes\) could not be written: '
            r'(File too large|No space left on device); nothing is there', error)
        assert 'Traceback' not in log.read_text()
        assert epochs(work_dir) == [1]
        assert_same_training(work_dir / 'epoch_1.pth', uninterrupted / 'epoch_1.pth')


def test_a_file_size_limit(config, uninterrupted, tmp_path):
    """The file system refuses to go on inside the file; the next start without it does."""
    work_dir, log = tmp_path / 'run', tmp_path / 'log'
    short = ['--cfg-options', 'train_cfg.max_epochs=']
    assert finish(train(config, work_dir, log, short[0], short[1] + '1')) == [0]
    limit = (work_dir / 'epoch_1.pth').stat().st_size // 2
    # A writer that was killed before.
    (work_dir / '.epoch_1.pth.1.tmp').write_bytes(b'half')
    check_full(config, uninterrupted, work_dir, log, (
        train(config, work_dir, log, *short[:1], short[1] + '2', size_limit=limit)
        for _ in range(2)))
    assert finish(train(config, work_dir, log, short[0], short[1] + '2')) == [0]
    assert epochs(work_dir) == [2]
    assert_same_training(work_dir / 'epoch_2.pth', uninterrupted / 'epoch_2.pth')
    assert not list(work_dir.glob('.*'))


def test_a_full_disk(config, uninterrupted, tmp_path):
    """A file system of 2 MiB, which the test fills."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'none', str(disk)],
                             capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f'no file system may be mounted: {mounted.stderr.strip()}')
    try:
        work_dir, log = disk / 'run', tmp_path / 'log'
        epochs_1, epochs_2 = (['--cfg-options', f'train_cfg.max_epochs={n}'] for n in (1, 2))
        assert finish(train(config, work_dir, log, *epochs_1)) == [0]
        size = (work_dir / 'epoch_1.pth').stat().st_size
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / 'ballast').write_bytes(bytes(free - size // 2))
        check_full(config, uninterrupted, work_dir, log, [train(config, work_dir, log, *epochs_2)])
        (disk / 'ballast').unlink()
        assert finish(train(config, work_dir, log, *epochs_2)) == [0]
        assert_same_training(work_dir / 'epoch_2.pth', uninterrupted / 'epoch_2.pth')
        assert not list(work_dir.glob('.*'))
    finally:
        subprocess.run(['umount', str(disk)], check=True)
