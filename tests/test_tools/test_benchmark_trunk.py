from __future__ import annotations

import pytest
import torch

from mmprotune.errors import DataError, LaunchError

from .conftest import load_tool

tool = load_tool('analysis_tools/benchmark_trunk.py')


def result(**changes) -> dict:
    ways = {way: [dict(tasks=n, resident=factor * n * 2**20, tensors=n, image_s=0.5 * n,
                       adding_peak=4 * factor * 2**20, backbone_s=0.25 * factor, first_add_s=3.,
                       later_add_s=2. if n > 1 else None)
                  for n in (1, 2)] for way, factor in (('trunk', 1), ('separate', 3))}
    return {'backbone': 'resnet50', 'insert': 'outputs', 'scale': 224, **ways, **changes}


def test_table_and_plot(tmp_path):
    lines = tool.table(result()).splitlines()
    assert lines[-1] == ('| 2 | 2 | 6 | 4 | 12 | 1.000 | 1.000 | 0.250 | 0.750 '
                         '| 2.000 | 2.000 |')
    assert lines[-2].endswith('| – | – |')
    tool.plot([result(), result(insert='none')], str(tmp_path / 'a.png'))
    assert (tmp_path / 'a.png').stat().st_size > 5000


def test_the_peak_counts_what_is_given_back_again():
    before, peak = tool.resident('cpu'), tool.Peak('cpu')
    assert peak() - before < 64 * 2**20
    torch.ones(2**25)  # 128 MiB
    assert tool.resident('cpu') - before < 64 * 2**20
    assert peak() - before > 120 * 2**20


@pytest.mark.parametrize('argv, message', [
    (['--plot', 'a.png'], '--json, which is missing'), (['--scale', '0'], 'at least 1, got 0'),
    (['--tasks', '0'], '--tasks must be at least 1'), (['--backbone', 'x'], 'invalid choice')])
def test_wrong_arguments(argv, message, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(['a.jpg', '--weights', 'w.pth', *argv])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('kind', tool.KINDS)
def test_configs_survive_the_checkpoint(kind):
    from mmprotune.config_nodes import parse_config
    args = tool.parse_args(['a.jpg', '--weights', 'w.pth', '--insert', 'none'])
    cfg = tool.task_cfg(kind, args)
    found = parse_config(cfg.pretty_text)
    assert found.to_dict() == cfg.to_dict()
    assert found.model.backbone.prompt is None


def test_files_are_looked_for_first(tmp_path):
    import cv2
    import numpy as np
    picture = str(tmp_path / 'a.png')
    cv2.imwrite(picture, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(LaunchError, match="--weights: no file 'no.pth'"):
        tool.main([picture, '--weights', 'no.pth'])
    with pytest.raises(DataError, match='no.jpg'):
        tool.main(['no.jpg', '--weights', picture])
