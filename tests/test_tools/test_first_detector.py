"""docs/first_detector.md and docs/labels.md, followed as they stand, on a few drawn images."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO

from tests.conftest import build

from .conftest import REPO, draw_coco, load_tool

PAGE = (REPO / 'docs' / 'first_detector.md').read_text(encoding='utf-8')
LOGGING = (REPO / 'docs' / 'logging.md').read_text(encoding='utf-8')
LABELS = (REPO / 'docs' / 'labels.md').read_text(encoding='utf-8')


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)


def smaller(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_the_page_makes_a_detector_and_a_picture(tmp_path, monkeypatch, capsys, run_command):
    monkeypatch.chdir(tmp_path)
    images = Path('data/mine/images')
    images.mkdir(parents=True)
    draw_coco(images)
    for name in ('train.json', 'val.json'):
        shutil.copy(images / 'ann.json', f'data/mine/{name}')
    (images / 'ann.json').unlink()
    config, inference = blocks(PAGE, 'python')
    # A checkout that is not installed has no `mmprotune::`.
    config = config.replace('mmprotune::', f'{REPO}/configs/')
    Path('my_detector.py').write_text(smaller(
        config, ("('person', )", "('square', 'other')"), ('(320, 320) ', '(64, 64) '),
        ('epochs, rate = 4, 6,', 'epochs, rate = 2, 1,')))
    weights = tmp_path / 'resnet18.pth'
    torch.save(build(dict(type='mmdet.ResNet', depth=18)).state_dict(), weights)
    file = f'model.backbone.backbone.init_cfg.checkpoint={weights}'
    assert file.partition('=')[0] in PAGE
    options = ['--cfg-options', file, *(
        f'{loader}_dataloader.{key}' for loader in ('train', 'val', 'test')
        for key in ('num_workers=0', 'persistent_workers=False'))]

    load_tool('train.py').main(['my_detector.py', *options])
    saved = torch.load('work_dirs/my_detector/epoch_1.pth', weights_only=True)['state_dict']
    assert any(name.startswith('backbone.prompts.') for name in saved)
    assert not any(name.startswith('backbone.backbone.') for name in saved)
    capsys.readouterr()
    load_tool('test.py').main(['my_detector.py', 'work_dirs/my_detector/epoch_1.pth',
                               '--show-dir', 'drawn', *options])
    drawn = list(Path('work_dirs/my_detector').glob('*/drawn/*'))
    assert {path.name for path in drawn} == {f'{i}.png' for i in range(4)}

    # The config in the checkpoint names the file that the run had.
    exec(smaller(inference, ('epoch_6', 'epoch_1')), {})
    assert len(list(Path('found/vis').iterdir())) == 4
    command, = (line for block in blocks(PAGE, 'bash') for line in block.splitlines()
                if line.startswith('python tools/predict.py'))
    load_tool('predict.py').main(smaller(command, ('epoch_6', 'epoch_1')).split()[2:])
    assert len(list(Path('predictions/pictures').iterdir())) == 4

    # docs/logging.md goes on with the same run.
    for block in blocks(LOGGING, 'bash'):
        if 'analysis_tools' in block:
            done = run_command('bash', '-c', f'python() {{ "$PYTHON" -W ignore "$@"; }}; {block}')
            assert done.returncode == 0, done.stderr
    assert len(list(Path('shown').iterdir())) == 4
    assert Path('losses.png').exists()


def test_names_in_a_json_file(tmp_path, run_command):
    command = next(line for block in blocks(PAGE, 'bash') for line in block.splitlines()
                   if line.startswith('python -c'))
    (tmp_path / 'data/mine').mkdir(parents=True)
    (tmp_path / 'data/mine/train.json').write_text(json.dumps(dict(categories=[dict(name='a')])))
    assert run_command('bash', '-c', command).stdout.strip() == "['a']"


def run_snippet(function: str) -> None:
    """Runs the block of the page that defines a function and calls it."""
    code, = (block for block in blocks(LABELS, 'python') if f'def {function}(' in block)
    exec(code, {})


def test_one_json_becomes_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('data/mine').mkdir(parents=True)
    images = [dict(id=i, file_name=f'{i}.png', width=4, height=4) for i in range(10)]
    found = [dict(id=i, image_id=i // 2, category_id=1, bbox=[0, 0, 1, 1]) for i in range(20)]
    Path('data/mine/all.json').write_text(json.dumps(
        dict(images=images, annotations=found, categories=[dict(id=1, name='a')])))
    run_snippet('split')
    parts = [json.loads(Path(f'data/mine/{name}.json').read_text()) for name in ('train', 'val')]
    ids = [{image['id'] for image in part['images']} for part in parts]
    assert [len(part) for part in ids] == [8, 2] and not ids[0] & ids[1]
    for part, own in zip(parts, ids):
        assert [a['image_id'] for a in part['annotations']] == sorted([*own, *own])
        assert part['categories'] == [dict(id=1, name='a')]


def test_yolo_text_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('images', 'labels'):
        Path('data/mine', name).mkdir(parents=True)
    for name in ('a', 'b'):
        cv2.imwrite(f'data/mine/images/{name}.png', np.zeros((50, 100, 3), np.uint8))
    Path('data/mine/labels/a.txt').write_text('1 0.5 0.5 0.2 0.4\n0 0.1 0.1 0.3 0.1 0.3 0.5\n')
    run_snippet('yolo_to_coco')
    coco = COCO('data/mine/train.json')
    box, polygon = coco.loadAnns(coco.getAnnIds())
    assert [c['name'] for c in coco.loadCats([box['category_id'], polygon['category_id']])] == [
        'dog', 'cat']
    assert np.allclose(box['bbox'], [40, 15, 20, 20]) and coco.annToMask(box).sum() == 400
    assert np.allclose(polygon['bbox'], [10, 5, 20, 20])
    assert len(coco.getImgIds()) == 2 and box['image_id'] == polygon['image_id']


def test_colours_become_indices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('data/mine/coloured').mkdir(parents=True)
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0, 1] = (0, 0, 255)  # red, in OpenCV's order
    picture[1, 1] = (9, 9, 9)
    cv2.imwrite('data/mine/coloured/x.png', picture)
    run_snippet('colours_to_indices')
    found = cv2.imread('data/mine/masks/train/x.png', cv2.IMREAD_UNCHANGED)
    assert found.tolist() == [[0, 1], [0, 255]]
