"""Two thousand iterations: memory and open files stay what they were."""
import json

import numpy as np
import pytest
import torch

from tests.detection import detector_cfg

from .models import prompted
from .processes import finish, start

WARM_UP = 100  # iterations of each process; the allocator's pools and caches fill
MIB = 2**20


def soak(data, weights, tmp_path, iterations, parts):
    """Trains with an exponential average, in ``parts`` processes that resume one another."""
    cfg = detector_cfg(prompted(weights), data, tmp_path)
    per_part = iterations // parts
    cfg.train_dataloader.batch_size = 1
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=per_part // 4, dataset=cfg.train_dataloader.dataset)
    cfg.custom_hooks += [dict(type='EMAHook', update_buffers=True), dict(type='Meter')]
    cfg.default_hooks.logger.interval = 50
    cfg.train_cfg.val_interval = 10**6
    cfg.dump(str(tmp_path / 'soak.py'))
    work_dir, log = tmp_path / 'run', tmp_path / 'log'
    for epoch in range(1, parts + 1):
        code, = finish(start('train.py', [
            tmp_path / 'soak.py', '--work-dir', work_dir, '--resume', '--cfg-options',
            f'train_cfg.max_epochs={epoch}'], log))
        assert code == 0, log.read_text()[-3000:]
    rows = np.loadtxt(work_dir / 'meter.csv', delimiter=',')
    assert rows[-1, 0] == iterations
    return rows, work_dir


def slopes(rows, per_part):
    """MiB of resident memory per 100 iterations, of each process after its warm-up."""
    found = []
    for start_at in range(0, int(rows[-1, 0]), per_part):
        part = rows[(rows[:, 0] > start_at + WARM_UP) & (rows[:, 0] <= start_at + per_part)]
        found.append(100 * np.polyfit(part[:, 0], part[:, 1] / MIB, 1)[0])
    return found


@pytest.mark.slow
def test_soak(data, resnet18_file, tmp_path):
    rows, work_dir = soak(data, resnet18_file, tmp_path, iterations=2000, parts=4)
    found = slopes(rows, 500)
    files = [rows[(rows[:, 0] > i) & (rows[:, 0] <= i + 500), 2] for i in range(0, 2000, 500)]
    print(json.dumps(dict(
        mib_per_100_iterations=[round(s, 4) for s in found],
        resident_mib=[round(rows[:, 1].min() / MIB), round(rows[:, 1].max() / MIB)],
        open_files=[[int(part.min()), int(part.max())] for part in files])))
    assert max(found) < 1
    for part in files:
        assert part.min() == part.max()
    assert len({part.max() for part in files}) == 1
    weights = torch.load(work_dir / 'epoch_4.pth', weights_only=True)
    assert weights['meta']['iter'] == 2000
    assert all(v.isfinite().all() for v in weights['state_dict'].values())


def test_the_slope_would_be_seen():
    """A leak of 2 MiB per 100 iterations, under noise."""
    rows = np.array([(i, (500 + 0.02 * i + i % 3) * MIB, 9) for i in range(10, 1010, 10)])
    assert all(s == pytest.approx(2, abs=0.1) for s in slopes(rows, 500))
