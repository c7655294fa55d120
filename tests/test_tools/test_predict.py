"""Predictions on image files, by the inferencers of all three hosts."""
import copy
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from mmprotune.engine import cli
from mmprotune.errors import CheckpointError, DataError, LaunchError, TrunkError
from tests.test_engine.tasks import HOSTS, alone, backbone, picture, save_task, task_cfg
from tests.test_tools.conftest import load_tool

tool = load_tool('predict.py')


@pytest.fixture(scope='module')
def tasks(tmp_path_factory, resnet18_file):
    folder = tmp_path_factory.mktemp('tasks')
    return {kind: save_task(folder / f'{kind}.pth', kind, backbone(resnet18_file))
            for kind in HOSTS}


@pytest.fixture
def photos(tmp_path):
    """Three images, of two sizes."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    for name, size in (('a', (48, 64)), ('b', (48, 64)), ('c', (64, 40))):
        cv2.imwrite(str(folder / f'{name}.png'), picture(ord(name), size))
    return folder


def predict(weights, images, out, *options):
    tool.main([*map(str, images), '--weights', weights, '--out', str(out), '--device', 'cpu',
               *options])
    return json.loads((out / 'predictions.json').read_text())


@pytest.mark.parametrize('kind', HOSTS)
def test_the_results_are_the_hosts_own(kind, tasks, photos, tmp_path, capsys):
    found = predict(tasks[kind], [photos], tmp_path / 'out')
    assert [entry['file_name'] for entry in found['images']] == [
        str(photos / f'{name}.png') for name in 'abc']
    assert '3 of 3 images' in capsys.readouterr().out
    boxes = 0
    for entry in found['images']:
        expected = alone(tasks[kind], entry['file_name'])
        drawn = cv2.imread(str(tmp_path / 'out' / entry['picture']))
        original = cv2.imread(entry['file_name'])
        if kind != 'classifier':  # mmpretrain enlarges small ones
            assert drawn.shape == original.shape
        if kind == 'detector':
            own = [a for a in found['annotations'] if a['image_id'] == entry['id']]
            corners = [[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in own)]
            np.testing.assert_allclose(corners, expected.pred_instances.bboxes, atol=1e-4)
            np.testing.assert_allclose([a['score'] for a in own], expected.pred_instances.scores)
            assert [a['category_id'] for a in own] == (expected.pred_instances.labels + 1).tolist()
            boxes += len(own)
        elif kind == 'segmentor':
            labels = cv2.imread(str(tmp_path / 'out' / entry['labels']), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(labels, expected.pred_sem_seg.data[0])
            assert sum(entry['share'].values()) == pytest.approx(1, abs=1e-3)
            assert not np.array_equal(drawn, original)
        else:
            np.testing.assert_allclose(entry['scores'], expected.pred_score)
            assert entry['class'] == found['classes'][int(expected.pred_label)]
    assert boxes or kind != 'detector'


@pytest.mark.parametrize('kind', HOSTS)
def test_batches_hold_images_of_one_size(kind, tasks, photos, tmp_path):
    """a and b share a batch, c has another size and has its own."""
    one = predict(tasks[kind], [photos], tmp_path / 'one')
    several = predict(tasks[kind], [photos], tmp_path / 'several', '--batch-size', '3')
    assert several['images'][2]['file_name'].endswith('c.png')
    for first, second in zip(one['images'], several['images']):
        assert first['id'] == second['id'] and first['picture'] == second['picture']
        np.testing.assert_allclose(first.get('scores', 0), second.get('scores', 0), atol=1e-5)
    scores = [[a['score'] for a in found.get('annotations', [])] for found in (one, several)]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_masks_are_in_the_form_of_coco(project, tmp_path):
    from pycocotools.coco import COCO
    cfg = Config.fromfile(project.prompted)
    torch.manual_seed(0)
    full = dict(state_dict=checkpoint.full_state_dict(build_model(cfg)),
                meta=dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=('square', 'other'))))
    torch.save(full, tmp_path / 'full.pth')
    predict(str(tmp_path / 'full.pth'), [project.folder / '0.png'], tmp_path / 'out')
    coco = COCO(str(tmp_path / 'out' / 'predictions.json'))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == ['square', 'other']
    annotations = coco.loadAnns(coco.getAnnIds())
    assert annotations
    for one in annotations:
        assert coco.annToMask(one).shape == (64, 64)
        assert coco.annToMask(one).sum() == one['area']
    again = coco.loadRes(annotations)
    assert again.getAnnIds() == coco.getAnnIds()


def test_files_folders_and_patterns(photos, tmp_path):
    (photos / 'notes.txt').write_text('none')
    (photos / 'below').mkdir()
    cv2.imwrite(str(photos / 'below' / 'a.png'), picture())
    names = [str(photos / f'{name}.png') for name in 'abc']
    assert tool.find_images([str(photos)]) == names
    assert tool.find_images([names[2], str(photos / '[ac].png')]) == [names[2], names[0]]
    everything = tool.find_images([str(photos / '**' / '*.png')])
    assert sorted(everything) == sorted([*names, str(photos / 'below' / 'a.png')])
    assert len(set(tool.output_names(everything).values())) == 4
    assert tool.output_names(names)[names[0]] == 'a'

    (tmp_path / 'empty').mkdir()
    (tmp_path / 'film.MP4').write_bytes(b'0' * 64)
    (tmp_path / 'text.png').write_text('none')
    for name, match in (('empty', 'a folder without image files'), ('film.MP4', 'a video'),
                        ('text.png', 'no image that OpenCV'), ('no.png', 'no such file'),
                        ('no*.png', 'no pattern that fits')):
        with pytest.raises(DataError, match=match):
            tool.find_images([str(tmp_path / name)])


def test_nothing_is_overwritten_or_lost(tasks, photos, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    run = tool.Predictor.__call__

    def fail_at_last(self, files):
        if files[0].endswith('c.png'):
            raise RuntimeError('out of memory')
        return run(self, files)

    monkeypatch.setattr(tool.Predictor, '__call__', fail_at_last)
    with pytest.raises(RuntimeError, match='out of memory'):
        predict(tasks['segmentor'], [photos], out)
    before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    assert len(json.loads(before[out / 'predictions.json'])['images']) == 2
    assert {path.name for path in before} == {'a.png', 'b.png', 'a.jpg', 'b.jpg',
                                              'predictions.json'}
    with pytest.raises(LaunchError, match='--out: .*out exists and is not an empty folder'):
        predict(tasks['segmentor'], [photos], out)
    assert before == {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}


def test_the_config_comes_from_the_checkpoint_or_is_named(tasks, photos, tmp_path):
    loaded = torch.load(tasks['classifier'], weights_only=True)
    config = tmp_path / 'config.py'
    config.write_text(loaded['meta'].pop('cfg'))
    bare = str(tmp_path / 'bare.pth')
    torch.save(loaded, bare)
    with pytest.raises(TrunkError, match=r'holds no config .*name it: --config CONFIG'):
        predict(bare, [photos], tmp_path / 'out')
    named = predict(bare, [photos], tmp_path / 'named', '--config', str(config))
    assert named == predict(tasks['classifier'], [photos], tmp_path / 'own')


def test_a_checkpoint_that_does_not_fit(tasks, photos, tmp_path):
    """The hosts load it with a warning, and predict at random."""
    loaded = torch.load(tasks['segmentor'], weights_only=True)
    del loaded['state_dict']['decode_head.conv_seg.weight']
    short = str(tmp_path / 'short.pth')
    torch.save(loaded, short)
    with pytest.raises(CheckpointError, match='short.pth: .*decode_head.conv_seg.weight'):
        predict(short, [photos], tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_errors_are_one_line(tasks, photos, tmp_path, capsys):
    for options, match in ((['--weights', 'no.pth'], "--weights: no file 'no.pth'"),
                           (['--weights', tasks['detector'], '--device', 'abacus'],
                            "device: 'abacus' cannot be used")):
        assert cli.run_tool(lambda options=options: tool.main(
            [str(photos), *options, '--out', str(tmp_path / 'out')])) == 1
        error = capsys.readouterr().err
        assert match in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_a_segmentor_that_hands_its_pretrained_file_on(resnet18_file, photos, tmp_path):
    """mmseg's inferencer deletes it, and the backbone would be a random one."""
    cfg = task_cfg('segmentor', backbone(resnet18_file))
    cfg.model.pretrained = cfg.model.backbone.backbone.pop('init_cfg').checkpoint
    state_dict = build_model(copy.deepcopy(cfg)).state_dict()
    file = str(tmp_path / 'task.pth')
    torch.save(dict(state_dict=state_dict, meta=dict(
        cfg=cfg.pretty_text, dataset_meta=dict(classes=('a', 'b', 'c')))), file)
    assert len(predict(file, [photos], tmp_path / 'out')['images']) == 3
