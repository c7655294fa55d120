"""Exported files compute what the hosts do with the checkpoint, prompts included."""
import json
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from mmprotune.engine import cli
from mmprotune.engine import export as engine
from mmprotune.errors import ExportError, LaunchError
from tests.conftest import build, wake
from tests.test_engine.tasks import HOSTS, alone, backbone, picture, save_task, task_cfg
from tests.test_tools.conftest import REPO, load_tool

tool = load_tool('export.py')
pytestmark = pytest.mark.skipif(not hasattr(torch.export, 'Dim') or
                                not hasattr(torch.export.Dim, 'AUTO'),
                                reason='torch before 2.6 does not export')


@pytest.fixture(scope='module')
def tasks(tmp_path_factory, resnet18_file):
    """Checkpoints of models that train with lean layers."""
    folder = tmp_path_factory.mktemp('tasks')
    return {kind: save_task(folder / f'{kind}.pth', kind, backbone(resnet18_file, lean=True))
            for kind in HOSTS}


def read_file(file):
    """What runs a file, and what it says of itself."""
    if file.suffix == '.onnx':
        import onnx
        said, = (p.value for p in onnx.load(str(file)).metadata_props if p.key == 'mmprotune')
    else:
        extra = {'mmprotune.json': ''}
        torch.export.load(str(file), extra_files=extra)
        said = extra['mmprotune.json']
    said = json.loads(said)
    run = engine.FORMATS[file.suffix][1](file)
    return lambda image: dict(zip(said['outputs'], run(image))), said


def prepared(photo, said):
    """The input that the file says it takes."""
    assert said['channels'] == 'RGB'
    image = (photo[..., ::-1] - np.array(said['mean'])) / np.array(said['std'])
    return torch.from_numpy(image).float().permute(2, 0, 1)[None]


@pytest.mark.parametrize('suffix', engine.SUFFIXES)
@pytest.mark.parametrize('kind', HOSTS)
def test_the_file_computes_what_the_host_does(kind, suffix, tasks, tmp_path, capsys):
    if suffix == '.onnx':
        for name in engine.NEEDED:
            pytest.importorskip(name, reason="the extra 'export' is not installed")
    file = tmp_path / f'model{suffix}'
    tool.main(['-', tasks[kind], str(file), '--size', '96', '160'])
    printed = capsys.readouterr().out
    assert 'limit 0.0001' in printed
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    run, said = read_file(file)
    assert said['kind'] == kind
    if kind == 'detector' and suffix == '.pt2' and said['free'] == ['batch']:
        # PyTorch 2.10 makes it a condition whether an FPN's maps are even; 2.14 does not.
        assert torch.__version__ < (2, 14) and 'image (batch, 3, 96, 160)' in printed
        return
    assert 'image (batch, 3, height, width), RGB' in printed
    assert said['free'] == ['batch', 'height', 'width']

    photo = picture(3, (64, 64))  # the size that the pipeline makes of it
    expected, found = alone(tasks[kind], photo), None
    image = prepared(photo, said)
    if kind == 'detector':  # one point is all that the last map has of so small an image
        image = torch.nn.functional.pad(image, (0, 64, 0, 32))
    found = run(image)
    if kind == 'classifier':
        assert len(said['classes']) == 4
        torch.testing.assert_close(found['logits'].softmax(1)[0], expected.pred_score,
                                   atol=1e-5, rtol=0)
    elif kind == 'segmentor':
        assert torch.equal(found['logits'].argmax(1)[0], expected.pred_sem_seg.data[0])
        torch.testing.assert_close(found['logits'][0], expected.seg_logits.data,
                                   atol=1e-4, rtol=0)
    else:
        cfg = Config.fromstring(torch.load(tasks[kind], weights_only=True)['meta']['cfg'], '.py')
        model = build_model(cfg)
        checkpoint.load(model, tasks[kind])
        with torch.no_grad():
            maps = model.extract_feat(image)
            scores, boxes = model.rpn_head(maps)
        for name, tensors in (('feature', maps), ('cls_scores', scores), ('bbox_preds', boxes)):
            for i, tensor in enumerate(tensors):
                torch.testing.assert_close(found[f'{name}_{i}'], tensor, atol=1e-4, rtol=1e-4)


# --- boxes -----------------------------------------------------------------------------------

ONE_STAGE = {
    'retinanet': ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', 'retina_cls', dict(
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        bbox_head=dict(in_channels=16, feat_channels=16, num_classes=3, stacked_convs=1))),
    'rtmdet': ('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', 'rtm_cls', dict(
        neck=dict(in_channels=[16, 32, 64], out_channels=16),
        bbox_head=dict(in_channels=16, feat_channels=16, num_classes=3, stacked_convs=1))),
    # Its scores have factors.
    'fcos': ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 'conv_cls', dict(
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        bbox_head=dict(in_channels=16, feat_channels=32, num_classes=3, stacked_convs=1))),
}


def one_stage(name: str, prompted: dict) -> tuple[Config, str]:
    """A tiny one-stage detector's config, and what the layers that make its scores are called."""
    stock, layer, model = ONE_STAGE[name]
    cfg = cli.load_config(stock)
    cfg.merge_from_dict(dict(model=model))
    if name == 'rtmdet':
        prompted['backbone']['out_indices'] = (1, 2, 3)
    cfg.model.backbone = prompted
    return cfg, layer


def save_detector(path: Path, name: str, file: str) -> str:
    """A checkpoint whose scores differ enough for a threshold to choose some."""
    cfg, layer = one_stage(name, backbone(file))
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(cfg)
    wake(model)
    with torch.no_grad():
        for part, weights in model.bbox_head.named_parameters():
            if layer in part:
                # Far from where sigmoids are one: equal scores have no order.
                weights.copy_(torch.randn_like(weights) * 0.02)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(
        cfg=cfg.pretty_text, dataset_meta=dict(classes=('a', 'b', 'c')),
        mmprotune=checkpoint.describe_model(model))), path)
    return str(path)


def boxes_by_the_page(boxes, scores, test_cfg):
    """What docs/export.md does with the outputs of one image."""
    page = (REPO / 'docs' / 'export.md').read_text(encoding='utf-8')
    code, = re.findall(r'```python\n(from torchvision.ops import b.*?)```', page, re.DOTALL)
    given = dict(run=lambda _: (boxes, scores), image=None, said=dict(test_cfg=test_cfg))
    exec(code, given)
    return given['boxes'], given['scores'], given['labels']


def check_boxes(model, photo, found, test_cfg):
    """The file's boxes are those of the host's own detector, its way of choosing included."""
    from mmdet.structures import DetDataSample
    sample = DetDataSample(metainfo=dict(
        img_shape=photo.shape[2:], ori_shape=photo.shape[2:], scale_factor=(1.0, 1.0)))
    assert found['boxes'].shape[:2] == found['scores'].shape[:2]
    with torch.no_grad():
        expected = model.predict(photo, [sample])[0].pred_instances
    boxes, scores, labels = boxes_by_the_page(found['boxes'], found['scores'], test_cfg)
    assert len(expected) > 3

    def rows(scores, labels, boxes):
        """Of equal scores, either may come first."""
        return torch.tensor(sorted(torch.cat(
            [scores[:, None], labels[:, None], boxes], dim=1).tolist()))

    torch.testing.assert_close(
        rows(scores, labels, boxes),
        rows(expected.scores, expected.labels, expected.bboxes), atol=1e-4, rtol=1e-4)


def hosts_own(saved, test_cfg, score_thr):
    """The host's model of a checkpoint; it and the reader leave out by one threshold alone."""
    model = build_model(Config.fromstring(
        torch.load(saved, weights_only=True)['meta']['cfg'], '.py'))
    checkpoint.load(model, saved)
    assert test_cfg == model.test_cfg.to_dict()
    model.bbox_head.test_cfg.update(score_thr=score_thr, nms_pre=-1)
    test_cfg['score_thr'] = score_thr
    return model


@pytest.mark.parametrize('name', ONE_STAGE)
def test_boxes_are_those_of_the_host(name, resnet18_file, tmp_path, capsys):
    saved = save_detector(tmp_path / 'saved.pth', name, resnet18_file)
    file = tmp_path / 'model.pt2'
    tool.main(['-', saved, str(file), '--boxes'])
    assert 'boxes (2, ' in capsys.readouterr().out
    run, said = read_file(file)
    assert list(said['outputs']) == ['boxes', 'scores']
    assert said['free'] == ['batch', 'height', 'width']
    # Not smaller, or the last map is a point.
    image = torch.randn(1, 3, 224, 160, generator=torch.Generator().manual_seed(0))
    # Score factors come after the host's threshold and before the reader's.
    model = hosts_own(saved, said['test_cfg'], 0.0 if name == 'fcos' else 0.5)
    check_boxes(model, image, run(image), said['test_cfg'])


@pytest.mark.assets
def test_boxes_of_a_real_picture(assets, resnet18_file, tmp_path):
    """A photograph as the host's pipeline leaves it, through the .pt2."""
    saved = save_detector(tmp_path / 'saved.pth', 'retinanet', resnet18_file)
    file = tmp_path / 'model.pt2'
    tool.main(['-', saved, str(file), '--boxes'])
    run, said = read_file(file)
    photo = cv2.imread(str(sorted((assets / 'pennfudan' / 'images').iterdir())[0]))
    photo = cv2.resize(photo, (320, 256))
    if said['channels'] == 'RGB':
        photo = photo[..., ::-1]
    image = torch.from_numpy((photo - np.array(said['mean'])) / np.array(said['std']))
    image = image.float().permute(2, 0, 1)[None]
    model = hosts_own(saved, said['test_cfg'], 0.5)
    check_boxes(model, image, run(image), said['test_cfg'])


def test_boxes_of_other_models_are_refused(tasks, resnet18_file, tmp_path):
    file = str(tmp_path / 'model.pt2')
    with pytest.raises(ExportError, match='--boxes: ImageClassifier is a classifier'):
        tool.main(['-', tasks['classifier'], file, '--boxes'])
    with pytest.raises(ExportError, match='--boxes: FasterRCNN has two stages'):
        tool.main(['-', tasks['detector'], file, '--boxes'])
    head = build(dict(
        type='PAAHead', num_classes=3, in_channels=16, reg_decoded_bbox=True,
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8,
                              scales_per_octave=1, strides=[8, 16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_bbox=dict(type='GIoULoss')))
    model = engine.build(one_stage('retinanet', backbone(resnet18_file))[0])
    assert engine.Network(model, 'mmdet', boxes=True).kind == 'detector'
    model.bbox_head = head
    with pytest.raises(ExportError, match='PAAHead makes boxes in a way of its own.*raw outputs'):
        engine.Network(model, 'mmdet', boxes=True)


def test_another_result_is_not_written(tasks, tmp_path, monkeypatch):
    write, load = engine.FORMATS['.pt2']

    def load_another(file):
        run = load(file)
        return lambda image: [value + 1e-3 * value.abs().max().clamp_min(1) for value in run(image)]

    monkeypatch.setitem(engine.FORMATS, '.pt2', (write, load_another))
    with pytest.raises(ExportError, match=r'logits is 1.0e-03 .*nothing was written'):
        tool.main(['-', tasks['classifier'], str(tmp_path / 'model.pt2')])
    assert not list(tmp_path.iterdir())


def test_sizes_that_cannot_vary_are_fixed(tasks, tmp_path, monkeypatch):
    """Batches still may: a model that looks at the numbers themselves."""
    classify = engine.Network._classify

    def of_one_size(self, image):
        assert image.shape[2] == 64 and image.shape[3] == 96
        return classify(self, image)

    monkeypatch.setattr(engine.Network, '_classify', of_one_size)
    monkeypatch.setattr(engine, 'SIZES', ((192, 256), (64, 96)))
    file = tmp_path / 'model.pt2'
    tool.main(['-', tasks['classifier'], str(file)])
    run, said = read_file(file)
    assert said['free'] == ['batch'] and said['size'] == [64, 96]
    assert run(torch.zeros(5, 3, 64, 96))['logits'].shape == (5, 4)


def test_what_does_not_export_is_refused(tasks, resnet18_file, tmp_path):
    with pytest.raises(LaunchError, match=r'ends with \.onnx or \.pt2'):
        tool.main(['-', tasks['classifier'], str(tmp_path / 'model.pth')])
    out = tmp_path / 'model.pt2'
    out.write_bytes(b'mine')
    with pytest.raises(LaunchError, match='exists; nothing was written'):
        tool.main(['-', tasks['classifier'], str(out)])
    assert out.read_bytes() == b'mine'

    half = task_cfg('classifier', backbone(resnet18_file, lean=True, backbone_dtype='bfloat16'))
    with pytest.raises(LaunchError, match=r'model\.backbone\.backbone_dtype='):
        engine.build(half)
    stock = task_cfg('classifier', backbone(resnet18_file))
    stock.model.backbone = stock.model.backbone.backbone
    with pytest.raises(LaunchError, match='no PromptedBackbone'):
        engine.build(stock)
    # DETR and its kind are neither one-stage nor two-stage detectors.
    with pytest.raises(ExportError, match='Linear does not export: expected a one-stage or'):
        engine.Network(torch.nn.Linear(1, 1), 'mmdet')
    model = engine.build(task_cfg('segmentor', backbone(resnet18_file)))
    model.decode_head.convs = torch.nn.Sequential(torch.nn.AvgPool2d(9))
    with pytest.raises(ExportError, match=r'does not run on images alone, tried at \[\(3, 3\)\]'):
        engine.export(model, Config(dict(default_scope='mmseg')), tmp_path / 'a.pt2', [(3, 3)])


def test_sliding_windows_are_said(resnet18_file):
    cfg = task_cfg('segmentor', backbone(resnet18_file))
    assert engine.Network(engine.build(cfg), 'mmseg').note == ''
    cfg.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    assert 'computes one window' in engine.Network(engine.build(cfg), 'mmseg').note


def test_a_missing_extra_is_one_line(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    for name in ('onnx', 'onnxruntime'):
        monkeypatch.setitem(sys.modules, name, sys)  # as if they were there
    out = tmp_path / 'model.onnx'
    assert cli.run_tool(lambda: tool.main(['-', tasks['classifier'], str(out)])) == 1
    error = capsys.readouterr().err
    assert 'ONNX needs onnxscript' in error and "extra 'export'" in error
    assert error.count('\n') == 1 and not out.exists()


def test_the_matrix_replaces_its_table_and_resumes(tmp_path, monkeypatch, capsys):
    matrix = load_tool('analysis_tools/export_matrix.py')
    ran = []

    def run(config, suffix, seconds):
        ran.append((config, suffix))
        if 'dino' in config:
            return dict(reason='DINO does not\nexport | at all', seconds=1)
        free = ['batch', 'height', 'width'] if suffix == '.onnx' else ['batch']
        return dict(reason='', kind='detector', free=free, size=[64, 96], difference=2e-6,
                    seconds=1)

    monkeypatch.setattr(matrix, 'run_apart', run)
    page, log = tmp_path / 'page.md', tmp_path / 'log.jsonl'
    options = ['--log', str(log), '--out', str(page)]
    with pytest.raises(LaunchError, match='--out: .*page.md has no lines'):
        matrix.main(['configs/a.py', *options])
    page.write_text(f'before\n{matrix.BEGIN}old\n{matrix.END}after\n')
    matrix.main(['configs/a.py', *options])
    matrix.main(['configs/a.py', 'configs/dino.py', *options])
    assert [config for config, _ in ran] == ['configs/a.py'] * 2 + ['configs/dino.py'] * 2
    text = page.read_text()
    assert text.startswith('before\n') and text.endswith('after\n') and 'old' not in text
    assert '| a | detector | batch varies, 64x96 | yes | 2e-06 |' in text
    assert text.count('DINO does not export / at all') == 2
