"""Maps of prompts over images, and predictions with and without them, for all three hosts."""
import cv2
import numpy as np
import pytest

from tests.test_engine.tasks import HOSTS, backbone, save_task
from tests.test_tools.conftest import load_tool

tool = load_tool('analysis_tools/show_prompts.py')


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for name, size in (('a', (48, 64)), ('b', (64, 40))):
        files.append(str(tmp_path / f'{name}.png'))
        cv2.imwrite(files[-1], rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    return files


@pytest.mark.parametrize('kind', HOSTS)
def test_maps_and_predictions(kind, pictures, resnet18_file, tmp_path, capsys):
    file = save_task(tmp_path / 'task.pth', kind, backbone(resnet18_file))
    tool.main(['-', file, *pictures, '--out', str(tmp_path / 'out'), '--compare',
               '--device', 'cpu'])
    found = {path.name: cv2.imread(str(path)) for path in (tmp_path / 'out').iterdir()}
    assert set(found) == {f'{name}_{what}.png' for name in ('0_a', '1_b')
                          for what in ('stage1', 'stage2', 'stage3', 'stage4', 'compared')}
    assert found['0_a_compared.png'].shape[0] == 48 and found['0_a_stage1.png'].std() > 10
    maps = [picture.tobytes() for name, picture in found.items() if 'stage' in name]
    assert len(set(maps)) == len(maps)
    out = capsys.readouterr().out
    assert out.count('of the feature') == 8 and out.count('with prompts') == 2


def test_wrong_arguments(pictures, resnet18_file, tmp_path):
    from mmprotune.errors import MMProtuneError
    file = save_task(tmp_path / 'task.pth', 'segmentor', backbone(resnet18_file))
    for arguments, match in (([file, 'none.png'], 'none.png: no such image'),
                             ([str(tmp_path / 'no.pth'), *pictures], 'no.pth')):
        with pytest.raises((MMProtuneError, FileNotFoundError), match=match):
            tool.main(['-', *arguments, '--out', str(tmp_path / 'out'), '--device', 'cpu'])
    assert not (tmp_path / 'out').exists()
