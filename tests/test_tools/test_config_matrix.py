"""The matrix of stock configs: two dozen of them here, sixty drawn ones under -m matrix."""
import importlib.util
import json
import sys

import pytest

from mmprotune.matrix.configs import config_names, sample
from mmprotune.matrix.limits import check_all
from tests.test_matrix.conftest import check, result_of, ship
from tests.test_tools.conftest import REPO

spec = importlib.util.spec_from_file_location(
    'config_matrix', REPO / 'tools/analysis_tools/config_matrix.py')
matrix = importlib.util.module_from_spec(spec)
sys.modules['config_matrix'] = matrix
spec.loader.exec_module(matrix)

TWENTY = [
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    # The init_cfg has no type.
    'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
    'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'mmdet::yolox/yolox_nano_8xb8-300e_coco.py',
    # The backbone's rate is a tenth.
    'mmdet::detr/detr_r18_8xb2-500e_coco.py',
    # The rate decays from layer to layer.
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    # The detector is part of a tracker, of a teacher and a student.
    'mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py',
    'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    # No pre-trained file but load_from.
    'mmdet::cityscapes/faster-rcnn_r50_fpn_1x_cityscapes.py',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
    'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    # Returns more in training.
    'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    # The file is that of a part of the backbone, or there is none.
    'mmseg::bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb8-160k_cityscapes-1024x1024.py',
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_coco-stuff164k-512x512.py',
    'mmseg::mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024.py',
    # Random weights in a deep network without shortcuts.
    'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py',
    # The classifier's own init_cfg draws linear layers anew.
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'mmpretrain::deit/deit-tiny_4xb256_in1k.py',
    'mmpretrain::convnext_v2/convnext-v2-atto_32xb32_in1k.py',
    'mmpretrain::resnet/resnet18_8xb16_cifar10.py',
    'mmpretrain::simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py',
]


@pytest.mark.parametrize('name', TWENTY)
def test_twenty(name):
    result = check(name)
    assert result['verdict'] == 'pass', result.get('traceback', result['reason'])
    assert result['prompts'] > 1 and result['configs'] == [name]


@pytest.mark.matrix
def test_sixty_drawn():
    results = list(check_all(sample(config_names(), 60, seed=0), jobs=2))
    assert sum(len(r['configs']) for r in results) == 60
    assert any(r['verdict'] == 'pass' for r in results)
    failed = {r['configs'][0]: r['reason'] for r in results if r['verdict'] == 'fail'}
    # Those that docs/configs.md names with their reason.
    lines = (REPO / 'docs/results/config_matrix.jsonl').read_text().splitlines()
    known = {name for run in map(json.loads, lines[1:]) if run['verdict'] == 'fail'
             for name in run['configs']}
    assert set(failed) <= known, failed


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    return ship(tmp_path, monkeypatch)


def test_a_command_that_was_cut_off_goes_on(shipped, tmp_path, monkeypatch, capsys):
    checked, places = [], []

    def check_all(runs, jobs, limits, insert):
        places.append(insert)
        for run in runs:
            checked.append(run.configs[0])
            yield dict(result_of('x'), key=run.key, configs=run.configs)

    monkeypatch.setattr(matrix, 'check_all', check_all)
    log, table = tmp_path / 'log' / 'x.jsonl', tmp_path / 'docs' / 'configs.md'
    assert matrix.main(['--log', str(log), '--only', '*::[ac].py']) == 0
    assert checked == ['mmdet::a.py', 'mmdet::c.py']
    with log.open('a') as file:
        file.write('{"key": "cut o')
    assert matrix.main(['--log', str(log), '--out', str(table)]) == 0
    assert checked == ['mmdet::a.py', 'mmdet::c.py', 'mmdet::e.py']
    assert len(log.read_text().splitlines()) == 4
    # The run of a.py stands for d.py, too.
    assert '| mmdet::a.py | 2 | init_cfg |' in table.read_text()
    assert '4 of 4 configs' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        matrix.main(['--log', str(log), '--seconds', '7'])
    assert 'was begun with' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        matrix.main(['--log', str(log), '--insert', 'narrow'])
    assert matrix.main(['--insert', 'narrow', '--out', str(table)]) == 0
    assert places == [None, None, 'narrow'] and '--insert narrow --out' in table.read_text()


@pytest.mark.parametrize('arguments, message', [
    (['--only', 'no such config'], "'no such config' matches none"),
    (['--jobs', '0'], '--jobs must be more than 0, got 0'),
    (['--memory', '-1'], '--memory must be more than 0, got -1'),
    (['--sample', '0'], '--sample must be more than 0, got 0'),
])
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        matrix.main(arguments)
    assert message in capsys.readouterr().err


def test_a_failure_is_the_exit_status(shipped, monkeypatch):
    monkeypatch.setattr(matrix, 'check_all', lambda runs, *args: iter(
        [dict(result_of('x', 'fail', reason='no'), key=run.key) for run in runs]))
    assert matrix.main(['--only', '*a.py']) == 1
