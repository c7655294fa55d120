"""Several processes compute what one computes, and notice when they do not belong together."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from mmprotune.models.identity import difference
from tests.detection import detector_cfg, draw_coco
from tests.test_tools.conftest import REPO

from .models import atss_cfg, prompted
from .processes import SECONDS, finish, free_port, start, start_ranks


@pytest.fixture(scope='module')
def uneven(tmp_path_factory):
    """Five pictures, two of them without an object: no two processes get as many."""
    folder = tmp_path_factory.mktemp('uneven')
    draw_coco(folder, images=5)
    content = json.loads((folder / 'ann.json').read_text())
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] not in (1, 4)]
    (folder / 'ann.json').write_text(json.dumps(content))
    return folder


def without_chance(cfg, folder, *hooks):
    """Leaves random transforms out: the processes would draw other numbers than one alone."""
    pipeline = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [
        t for t in pipeline if t['type'] not in ('RandomFlip', 'PhotoMetricDistortion')]
    cfg.optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
    cfg.custom_imports = dict(
        imports=['tests.test_reliability.work'], allow_failed_imports=False)
    cfg.custom_hooks += [dict(type='Recorder'), *hooks]
    folder.mkdir(exist_ok=True)
    cfg.dump(str(folder / 'tiny.py'))
    return folder / 'tiny.py'


@pytest.fixture(scope='module')
def config(tmp_path_factory, data, resnet18_file):
    folder = tmp_path_factory.mktemp('ranks')
    return without_chance(atss_cfg(prompted(resnet18_file), data, folder), folder)


def train(config, work_dir, *options):
    return [config, '--work-dir', work_dir, '--cfg-options', *options]


def record(work_dir, rank=0):
    return torch.load(work_dir / f'rank{rank}.pth', weights_only=True)


@pytest.fixture(scope='module')
def alone(config, tmp_path_factory):
    """One process with batches of two."""
    folder = tmp_path_factory.mktemp('alone')
    argv = train(config, folder, 'train_dataloader.batch_size=2')
    assert finish(start('train.py', argv, folder / 'log')) == [0], (folder / 'log').read_text()
    return record(folder)


def torchrun(argv, **env):
    """Starts ``dist_train.sh`` in a session of its own, so that it can be ended with all it
    started."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get('PYTHONPATH')]))
    return subprocess.Popen(
        ['bash', str(REPO / 'tools/dist_train.sh'), *map(str, argv)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**os.environ, 'PYTHONPATH': path, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1',
             'CUDA_VISIBLE_DEVICES': '', **env})


def await_all(*launchers):
    outputs = []
    try:
        for launcher in launchers:
            outputs.append(launcher.communicate(timeout=SECONDS)[0])
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, 9)
                launcher.wait()
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), \
        '\n'.join(outputs)[-5000:]
    return outputs


def assert_same_weights(found, expected):
    for name, weight in expected.items():
        if name.endswith('frozen_function'):  # packed numbers; threads round differently
            assert max(difference(found[name], weight)) < 1e-4
        else:
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)


def assert_as_alone(together, alone):
    assert len(together['gradients']) == len(alone['gradients']) == 4
    for found, expected in zip(together['gradients'], alone['gradients']):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=name)
    assert_same_weights(together['weights'], alone['weights'])
    assert any(g.abs().max() > 1e-2 for g in alone['gradients'][0].values())


# --- as one process ---------------------------------------------------------------------------


def test_two_processes_are_one_with_the_same_batch(config, alone, tmp_path):
    await_all(torchrun([config, 2, *train(config, tmp_path / 'run',
                                          'train_dataloader.batch_size=1')[1:]]))
    ranks = [record(tmp_path / 'run', rank) for rank in (0, 1)]
    for rank in ranks:
        assert_as_alone(rank, alone)
        assert rank['digests'] == alone['digests']
        assert not rank['unused']
        # Every step, the gradients of what trains, and not a byte more.
        assert rank['reduced'] == [rank['trainable_bytes']] * 4
        assert rank['trainable_bytes'] < rank['all_bytes']
    assert all(torch.equal(v, ranks[1]['weights'][k]) for k, v in ranks[0]['weights'].items())


@pytest.mark.slow
def test_two_machines_of_one_process_each(config, alone, tmp_path):
    """Two torchrun agents that meet on the loopback device."""
    argv = [config, 1, *train(config, tmp_path / 'run', 'train_dataloader.batch_size=1')[1:]]
    env = dict(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=str(free_port()))
    await_all(*(torchrun(argv, NODE_RANK=str(node), **env) for node in (0, 1)))
    for rank in (0, 1):
        assert_as_alone(record(tmp_path / 'run', rank), alone)


@pytest.mark.slow
def test_a_killed_rank_is_restarted_and_resumes(data, resnet18_file, alone, tmp_path):
    """By torchrun's own --max-restarts; PET_… is how it takes its options from the environment."""
    cfg = atss_cfg(prompted(resnet18_file), data, tmp_path)
    config = without_chance(cfg, tmp_path / 'config', dict(
        type='Mortal', rank=1, iteration=3, mark=str(tmp_path / 'died')))
    output, = await_all(torchrun(
        [config, 2, '--resume', *train(config, tmp_path / 'run',
                                       'train_dataloader.batch_size=1')[1:]], PET_MAX_RESTARTS='2'))
    assert (tmp_path / 'died').exists()
    assert 'resumed epoch: 1, iter: 2' in output
    for rank in (0, 1):
        found = record(tmp_path / 'run', rank)
        assert len(found['gradients']) == 2  # the second epoch
        assert_same_weights(found['weights'], alone['weights'])


# --- data that does not divide ----------------------------------------------------------------


def test_uneven_and_empty_batches(uneven, resnet18_file, tmp_path):
    """Five pictures on two processes, two of them without objects: nobody waits for ever, all end
    with the same weights, and both evaluate to what one process does."""
    cfg = detector_cfg(prompted(resnet18_file), uneven, tmp_path, **{
        'train_dataloader.batch_size': 1, 'train_cfg.max_epochs': 1,
        'train_dataloader.dataset.filter_cfg': dict(filter_empty_gt=False)})
    config = without_chance(cfg, tmp_path / 'config')
    work_dir = tmp_path / 'run'
    codes = finish(*start_ranks('train.py', [train(config, work_dir, 'resume=False')] * 2,
                                tmp_path / 'log'))
    assert codes == [0, 0], (tmp_path / 'log.0').read_text()[-3000:]
    first, second = (record(work_dir, rank) for rank in (0, 1))
    assert len(first['gradients']) == len(second['gradients']) == 3
    assert all(torch.equal(v, second['weights'][k]) for k, v in first['weights'].items())
    # Each picture counts once, whoever looks at it.
    argv = [config, work_dir / 'epoch_1.pth', '--work-dir']
    ranks = start_ranks('test.py', [[*argv, tmp_path / 'two']] * 2, tmp_path / 'test')
    codes = finish(*ranks, start('test.py', [*argv, tmp_path / 'one'], tmp_path / 'test'))
    assert codes == [0, 0, 0], (tmp_path / 'test.0').read_text()[-3000:]
    two, one = (json.loads(next((tmp_path / n).glob('*/*.json')).read_text())
                for n in ('two', 'one'))
    metrics = {k: v for k, v in one.items() if k.startswith('coco/')}
    assert metrics and metrics.items() <= two.items()


# --- ranks that disagree ----------------------------------------------------------------------


def stopped(ranks, work_dir, log):
    assert finish(*ranks) == [1, 1]
    messages = []
    for rank in (0, 1):
        text = (log.parent / f'{log.name}.{rank}').read_text()
        message, = re.findall(r'^train\.py: error: (.*)$', text, flags=re.M)
        messages.append(message)
        assert 'Epoch(train)' not in text
    assert messages[0] == messages[1]
    assert not list(work_dir.glob('*.pth'))
    return messages[0]


def test_another_pretrained_file_on_one_rank(config, other_resnet18_file, resnet18_file, tmp_path):
    """PyTorch's wrapper gives it the first rank's parameters beside its own norm statistics, and
    nobody would know."""
    other = train(config, tmp_path / 'run',
                  f'model.backbone.backbone.init_cfg.checkpoint={other_resnet18_file}')
    message = stopped(
        start_ranks('train.py', [train(config, tmp_path / 'run', 'resume=False'), other],
                    tmp_path / 'log'), tmp_path / 'run', tmp_path / 'log')
    found = re.fullmatch(r'.*: fingerprint of backbone: (\w{16}) on rank 0, (\w{16}) on rank 1; '
                         r'frozen tensors: .*\. Training was not started', message)
    from tests.conftest import build
    expected = [build(prompted(file)).own_fingerprint[:16]
                for file in (resnet18_file, other_resnet18_file)]
    assert list(found.groups()) == expected


def test_another_version_on_one_rank(config, tmp_path):
    argv = train(config, tmp_path / 'run', 'resume=False')
    port = str(free_port())
    ranks = [start('train.py', [*argv, '--launcher', 'pytorch'], tmp_path / f'log.{rank}', env=dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
        MASTER_PORT=port), version=version) for rank, version in enumerate((None, '9.9'))]
    message = stopped(ranks, tmp_path / 'run', tmp_path / 'log')
    assert re.search(r'mmprotune: [\d.]+\S* on rank 0, 9\.9 on rank 1\.', message)


# --- a fault on one rank ----------------------------------------------------------------------


@pytest.mark.parametrize('action', ['skip', 'stop'])
def test_what_is_not_finite_on_one_rank_concerns_all(data, resnet18_file, tmp_path, action):
    cfg = atss_cfg(prompted(resnet18_file), data, tmp_path, **{'train_cfg.max_epochs': 1})
    cfg.train_dataloader.batch_size = 1
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='DrawNaN', img_id=2))
    config = without_chance(cfg, tmp_path / 'config', dict(
        type='mmprotune.NonFiniteGuardHook', action=action))
    ranks = start_ranks('train.py', [train(config, tmp_path / 'run', 'resume=False')] * 2,
                        tmp_path / 'log')
    assert finish(*ranks) == [0 if action == 'skip' else 1] * 2
    text = (tmp_path / 'log.0').read_text()
    message = next(line for line in text.splitlines() if 'not finite in iteration' in line)
    told = dict(re.findall(r'rank (\d): (.*?) \(images', message))
    assert sum('loss_cls is nan' in found for found in told.values()) == 1
    assert re.search(r'\(images 2 \S+2\.png\)', message)
    if action == 'skip':
        first, second = (record(tmp_path / 'run', rank)['weights'] for rank in (0, 1))
        assert all(v.isfinite().all() and torch.equal(v, second[k]) for k, v in first.items())
