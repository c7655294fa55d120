"""What the quickstart draws, configures and refuses; the whole of it under ``-m slow``."""
from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [ROOT / 'configs' / f'mask_rcnn_r18_{kind}_shapes.py' for kind in ('protune', 'frozen')]


@pytest.fixture(scope='module')
def tools():
    """Imports the quickstart's modules as its own start finds them."""
    sys.path.insert(0, str(ROOT / 'tools'))
    yield importlib.import_module
    sys.path.remove(str(ROOT / 'tools'))


@pytest.fixture(scope='module')
def data(tools):
    return tools('quickstart_data')


@pytest.fixture(scope='module')
def quickstart(tools):
    return tools('quickstart')


@pytest.fixture(scope='module')
def drawn(data, tmp_path_factory):
    """Folder of a drawn set with 12 images to train on and 6 others."""
    root = tmp_path_factory.mktemp('shapes')
    data.write_coco(root, 'train', 12, 96, seed=3)
    data.write_coco(root, 'val', 6, 96, seed=3)
    return root


def pixels(root: Path, split: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((root / split).glob('*.png'))]


def test_drawing_depends_on_the_seed_alone(data, drawn, tmp_path):
    np.random.seed(99)  # the global generator must not matter
    data.write_coco(tmp_path / 'again', 'train', 12, 96, seed=3)
    data.write_coco(tmp_path / 'other', 'train', 12, 96, seed=4)
    assert pixels(tmp_path / 'again', 'train') == pixels(drawn, 'train')
    again = (tmp_path / 'again' / 'train.json').read_text()
    assert again == (drawn / 'train.json').read_text()
    assert not set(pixels(tmp_path / 'other', 'train')) & set(pixels(drawn, 'train'))


def test_validation_images_are_not_trained_on(drawn):
    assert len(pixels(drawn, 'val')) == 6
    assert not set(pixels(drawn, 'train')) & set(pixels(drawn, 'val'))


def test_drawn_set_is_valid_coco(data, drawn):
    coco = COCO(str(drawn / 'train.json'))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(data.SHAPES)
    assert len(coco.getImgIds()) == 12
    seen = set()
    for image in coco.loadImgs(coco.getImgIds()):
        picture = cv2.imread(str(drawn / 'train' / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3)
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert 1 <= len(annotations) <= 5
        masks = [coco.annToMask(a) for a in annotations]
        assert sum(masks).max() == 1  # a pixel shows one shape
        for annotation, mask in zip(annotations, masks):
            seen.add(annotation['category_id'])
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert annotation['bbox'] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert annotation['area'] == mask.sum() > 0
            assert annotation['iscrowd'] == 0
    assert seen == set(coco.getCatIds())


def test_shapes_can_be_seen(data):
    """Inside a mask another colour rules than around it."""
    for index in range(8):
        image, shapes = data.scene(96, data.stream(0, 'train', index))
        for _, mask in shapes:
            near = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7))).astype(bool) & ~mask
            difference = np.abs(image[mask].mean(0) - image[near].mean(0)).max()
            assert difference > 15, (index, difference)


def test_pretraining_is_another_task(data):
    assert not set(data.MOTIFS) & set(data.SHAPES)
    outlines = {name: np.concatenate(data._OUTLINES[name]())
                for name in (*data.MOTIFS, *data.SHAPES)}
    for motif in data.MOTIFS:
        for shape in data.SHAPES:
            assert not np.array_equal(outlines[motif], outlines[shape])


def test_grounds_are_unlike_those_of_pretraining(data):
    """Full of edges; those of the motifs are smooth but for noise."""
    def edges(image, ground) -> float:
        smooth = cv2.GaussianBlur(image, (0, 0), 1.5).astype(np.float32)
        across = np.hypot(cv2.Sobel(smooth, -1, 1, 0), cv2.Sobel(smooth, -1, 0, 1)).max(2)
        return float(np.median(across[ground]))

    for index in range(6):
        image, shapes = data.scene(96, data.stream(0, 'train', index))
        ground = ~np.any([mask for _, mask in shapes], axis=0)
        motif = data.pretraining_image(index, 96, data.stream(0, 'pretrain', index))
        assert edges(image, ground) > 1.5 * edges(motif, np.ones(motif.shape[:2], bool))


def test_pretraining_saves_an_ordinary_backbone(tools, tmp_path):
    """Stock keys, tensors only, statistics that have seen data; the wrapper freezes all of it."""
    from mmdet.models.backbones import ResNet
    from mmdet.registry import MODELS
    from mmengine.registry import DefaultScope
    file = tmp_path / 'backbone.pth'
    pretrain = tools('quickstart_pretrain')
    pretrain.main([
        str(CONFIGS[0]), '--out', str(file), '--images', '128', '--val-images', '24'])
    state = torch.load(file, weights_only=True)
    stock = ResNet(depth=18, base_channels=32)
    assert {key: value.shape for key, value in state.items()} == \
        {key: value.shape for key, value in stock.state_dict().items()}
    assert state['bn1.num_batches_tracked'] == 2 * pretrain.EPOCHS
    assert not list(tmp_path.glob('*.part'))

    cfg = Config.fromfile(CONFIGS[0]).model.backbone
    cfg.backbone.init_cfg.checkpoint = str(file)
    with DefaultScope.overwrite_default_scope('mmdet'):  # pre-training leaves MMEngine's
        wrapped = MODELS.build(cfg)
    assert torch.equal(wrapped.backbone.layer4[1].conv2.weight, state['layer4.1.conv2.weight'])
    assert set(wrapped.frozen_names) == set(state)


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_trains_what_it_says(config):
    from mmdet.registry import MODELS
    cfg = Config.fromfile(config)
    backbone = cfg.model.backbone
    assert backbone.type == 'mmprotune.PromptedBackbone'
    assert backbone['freeze'] == 'pretrained'  # as an attribute, a method of ConfigDict
    assert backbone.backbone.type == 'ResNet'
    backbone['freeze'] = 'all'
    backbone.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    trainable = {name.split('.')[1] for name, p in model.backbone.named_parameters(prefix='x')
                 if p.requires_grad}
    assert trainable == ({'prompts'} if 'protune' in config.stem else set())
    assert all(p.requires_grad for n, p in model.named_parameters() if n[:8] != 'backbone')


def test_the_two_configs_differ_in_the_prompt_alone(data):
    prompted, head_only = (Config.fromfile(config) for config in CONFIGS)
    assert prompted.model.backbone.prompt == dict(type='mmprotune.PromptBlock')
    assert head_only.model.backbone.prompt is None
    prompted.model.backbone.prompt = None
    assert prompted.to_dict() == head_only.to_dict()
    assert prompted.metainfo.classes == data.SHAPES
    assert prompted.model.roi_head.bbox_head.num_classes == len(data.SHAPES)
    assert prompted.model.roi_head.mask_head.num_classes == len(data.SHAPES)


def result(quickstart, mask_ap50: float):
    return quickstart.Run('prompted', Path('c.py'), Path('w'), trainable=1234, total=5678,
                          box_ap50=0.9, mask_ap50=mask_ap50, seconds=61.2,
                          checkpoint_bytes=4321)


def test_verdict(quickstart):
    line = quickstart.verdict(result(quickstart, 0.5))
    assert line == 'quickstart: ok mask_AP50=0.500 trainable=1234 checkpoint_bytes=4321'


@pytest.mark.parametrize('mask_ap50', [0.499, 0., -1., float('nan')])
def test_low_ap_fails(quickstart, monkeypatch, capsys, mask_ap50):
    """The box AP, here 0.9, does not make up for it."""
    monkeypatch.setattr(
        quickstart, 'quickstart',
        lambda *args: quickstart.verdict(result(quickstart, mask_ap50)))
    assert quickstart.main([]) == 1
    out, err = capsys.readouterr()
    assert 'quickstart: ok' not in out
    assert f'mask AP50 of "prompted" is {mask_ap50:.3f}, expected at least 0.5' in err


def test_good_ap_succeeds(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(
        quickstart, 'quickstart', lambda *args: quickstart.verdict(result(quickstart, 0.7)))
    assert quickstart.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith('quickstart: ok mask_AP50=0.700 ')


def test_table_shows_every_figure(quickstart):
    lines = quickstart.table([result(quickstart, 0.7)]).splitlines()
    assert lines[1].split() == ['prompted', '1,234', '5,678', '0.900', '0.700', '61', '4,321']
    assert len(lines[0]) == len(lines[1])


def test_ap_is_read_from_the_newest_evaluation(quickstart, tmp_path):
    for stamp, ap in (('20250101_000000', 0.1), ('20250102_000000', 0.2)):
        (tmp_path / stamp).mkdir()
        (tmp_path / stamp / f'{stamp}.json').write_text(
            json.dumps({'coco/bbox_mAP_50': ap + 0.5, 'coco/segm_mAP_50': ap}))
    assert quickstart.read_ap50(tmp_path) == (0.7, 0.2)
    with pytest.raises(quickstart.QuickstartError, match='no box and mask AP50'):
        quickstart.read_ap50(tmp_path / 'nothing')


def test_failing_step_is_reported_and_stops_the_others(quickstart, tmp_path):
    bad, slow = tmp_path / 'bad.py', tmp_path / 'slow.py'
    bad.write_text('raise SystemExit("no such luck")')
    mark = tmp_path / 'still_running'
    slow.write_text(f'import time; time.sleep(20); open({str(mark)!r}, "w")')
    with pytest.raises(quickstart.QuickstartError, match=r'bad\.py ended with status 1.*\n.*luck'):
        quickstart.run_all([('slow', tmp_path / 'slow.log', [slow]),
                            ('bad', tmp_path / 'bad.log', [bad])], threads=1)
    assert (tmp_path / 'slow.log').exists()
    assert not mark.exists()


def test_steps_run_at_the_same_time(quickstart, tmp_path):
    """Each of two scripts waits for the other's sign."""
    script = tmp_path / 'meet.py'
    script.write_text(
        'import pathlib, sys, time\n'
        'mine, other = map(pathlib.Path, sys.argv[1:])\n'
        'mine.touch()\n'
        'end = time.monotonic() + 60\n'
        'while not other.exists():\n'
        '    assert time.monotonic() < end\n'
        '    time.sleep(0.05)\n'
        'print("met")\n')
    a, b = tmp_path / 'a', tmp_path / 'b'
    seconds = quickstart.run_all([('a', tmp_path / 'a.log', [script, a, b]),
                                  ('b', tmp_path / 'b.log', [script, b, a])], threads=1)
    assert len(seconds) == 2
    assert all(0 < s < 60 for s in seconds)
    assert (tmp_path / 'a.log').read_text() == 'met\n'


def test_progress_is_shown(quickstart, tmp_path, capsys):
    script = tmp_path / 'train.py'
    script.write_text(
        'print("a line nobody needs")\n'
        'print("11/23 06:09:35 - mmengine - INFO - Epoch(train) [2][ 60/60]  lr: 1.0e-03  '
        'eta: 0:00:42  time: 0.1  loss: 3.1068  loss_cls: 1.2")\n'
        'print("11/23 06:09:35 - mmengine - INFO - Epoch(test) [8/8]    coco/bbox_mAP: 0.2  '
        'coco/bbox_mAP_50: 0.4590  coco/segm_mAP_50: 0.4490")\n')
    quickstart.run_all([('prompted', tmp_path / 'log', [script])], threads=1)
    out = capsys.readouterr().out
    assert 'nobody' not in out
    assert 'epoch 2  step  60/60  loss 3.1068  0:00:42 to go' in out
    assert 'bbox_mAP_50 0.4590  segm_mAP_50 0.4490' in out
    assert 'nobody needs' in (tmp_path / 'log').read_text()


@pytest.mark.slow
def test_whole_quickstart(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'quickstart.py', '--work-dir', tmp_path],
        capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    last = re.fullmatch(r'quickstart: ok mask_AP50=(\S+) trainable=(\d+) checkpoint_bytes=(\d+)',
                        done.stdout.splitlines()[-1])
    # Without prompts the backbone sees what it was trained to see.
    head = float(re.search(r'^frozen, head only .*?(0\.\d+)  +\d+  ', done.stdout, re.M)[1])
    assert float(last[1]) >= head + 0.05
    (checkpoint, ) = (tmp_path / 'prompted').glob('epoch_*.pth')
    assert int(last[3]) == checkpoint.stat().st_size
    # Slim: the frozen backbone, 11 MB, is not in it.
    assert int(last[3]) < (tmp_path / 'resnet18_drawn.pth').stat().st_size
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    weights = sum(v.numel() for k, v in state.items() if 'running_' not in k
                  and 'num_batches' not in k and '.frozen_' not in k)
    assert int(last[2]) == weights
    picture = cv2.imread(str(tmp_path / 'predictions.png'))
    assert picture.shape[0] > picture.shape[1] > 1000
