from __future__ import annotations

import json
import sys

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmprotune.engine import cli
from tests.conftest import RESNET18, build

from .conftest import REPO, load_tool

tool = load_tool('analysis_tools/count_params.py')


def report(capsys, *argv: str) -> tuple[dict, list[str]]:
    """The JSON of the last line, and the lines before it."""
    tool.main([*argv, '--json'])
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


class Toy(nn.Module):

    def __init__(self) -> None:
        super().__init__()
        self.data_preprocessor = nn.Module()
        self.data_preprocessor.register_buffer('mean', torch.zeros(3))
        self.backbone = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
        self.backbone[0].requires_grad_(False)
        self.neck = nn.Linear(2, 2, bias=False)
        self.query = nn.Parameter(torch.zeros(5))
        self.bbox_head = nn.Linear(2, 2, bias=False)
        self.bbox_head.weight = self.neck.weight


def test_counts_by_hand():
    counted = tool.count(Toy())
    assert counted['groups'] == dict(
        backbone=dict(trainable=4, frozen=4, buffers=5),  # two running statistics and a counter
        prompts=dict(trainable=0, frozen=0, buffers=0),
        neck=dict(trainable=4, frozen=0, buffers=0),  # shared with the head: counted once
        head=dict(trainable=5, frozen=0, buffers=0),
        other=dict(trainable=0, frozen=0, buffers=3))
    assert counted['total'] == dict(trainable=13, frozen=4, buffers=8)
    assert counted['trainable_share'] == pytest.approx(13 / 17)
    assert counted['prompts_to_backbone'] is None


def test_weights_in_8_bits_are_frozen_ones():
    counts = []
    for dtype in (None, 'int8'):
        backbone = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
                              backbone_dtype=dtype))
        counts.append(tool.count(nn.ModuleDict(dict(backbone=backbone))))
    assert counts[0]['total']['frozen'] == counts[1]['total']['frozen'] > 0
    assert counts[0]['trainable_share'] == counts[1]['trainable_share']


def test_prompted_config(capsys):
    path = str(REPO / 'configs' / 'mask_rcnn_r50_protune_coco.py')
    counted, lines = report(capsys, path)
    groups = counted['groups']
    # Four blocks: C*C/4+C/4, 25*C/4+C/4, C/4*C+C for C = 256, 512, 1024, 2048.
    prompts = sum(c * c // 2 + 27 * c // 4 + c for c in (256, 512, 1024, 2048))
    assert groups['prompts'] == dict(trainable=prompts, frozen=0, buffers=0)
    # torchvision's ResNet-50 without its classifier.
    assert groups['backbone']['frozen'] == 25_557_032 - (2048 * 1000 + 1000)
    assert groups['backbone']['trainable'] == 0
    assert counted['prompts_to_backbone'] == prompts / groups['backbone']['frozen']
    assert counted['prompts_to_backbone'] <= 0.13
    for column in ('trainable', 'frozen', 'buffers'):
        assert counted['total'][column] == sum(group[column] for group in groups.values())
    assert any(line.split()[:2] == ['prompts', f'{prompts:,}'] for line in lines)
    assert any('without the pre-trained file' in line for line in lines)


def test_protune_adds_the_prompts_to_a_stock_config(capsys):
    name = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    stock, lines = report(capsys, name)
    assert not any('without the pre-trained file' in line for line in lines)
    prompted, _ = report(
        capsys, name, '--protune', '--cfg-options', 'model.backbone.prompt.reduction=8')
    assert stock['groups']['prompts']['trainable'] == 0
    prompts = sum(c * (c // 8) * 2 + 27 * (c // 8) + c for c in (64, 128, 256, 512))
    assert prompted['groups']['prompts']['trainable'] == prompts
    assert prompted['groups']['head'] == stock['groups']['head']
    parameters = [
        counted['groups']['backbone']['trainable'] + counted['groups']['backbone']['frozen']
        for counted in (stock, prompted)
    ]
    assert parameters[0] == parameters[1]


def test_weights_freeze_what_the_file_fills(tmp_path, project, capsys):
    """A Swin with output norms that its file lacks: they train, and only loading tells."""
    pytest.importorskip('mmdet')
    from mmdet.models import SwinTransformer
    backbone = dict(embed_dims=8, depths=[2, 2, 2, 2], num_heads=[1, 1, 1, 1])
    file = tmp_path / 'swin.pth'
    weights = {
        f'backbone.{key}': value
        for key, value in SwinTransformer(**backbone).state_dict().items()
        if not key.startswith(('norm0', 'norm1', 'norm2', 'norm3'))
    }
    torch.save(dict(state_dict=weights), file)
    backbone.update(type='SwinTransformer', init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    config = project.write(
        'swin.py', f"""
        default_scope = 'mmdet'
        model = dict(
            type='RetinaNet', backbone={backbone!r},
            neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
            bbox_head=dict(
                type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8,
                anchor_generator=dict(
                    type='AnchorGenerator', ratios=[1.], scales=[4], strides=[8, 16, 32, 64, 128]),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder')))
        """)
    without, _ = report(capsys, config, '--protune')
    loaded, lines = report(capsys, config, '--protune', '--weights')
    norms = 2 * (8 + 16 + 32 + 64)
    assert without['groups']['backbone']['trainable'] == 0
    assert loaded['groups']['backbone']['trainable'] == norms
    assert loaded['groups']['backbone']['frozen'] == (
        without['groups']['backbone']['frozen'] - norms)
    assert not any('without the pre-trained file' in line for line in lines)


def test_sync_bn_does_not_stop_it():
    pytest.importorskip('mmseg')
    cfg = cli.load_config('mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-769x769.py')
    cfg = Config(dict(cfg, launcher='none'))
    cfg.model.decode_head.norm_cfg = dict(type='MMSyncBN', requires_grad=True)
    counted = tool.count(tool.build(cfg))
    assert counted['groups']['head']['buffers'] > 0


def test_from_the_command_line(run_command):
    config = REPO / 'configs' / 'faster_rcnn_r50_frozen_coco.py'
    done = run_command(sys.executable, tool.__file__, config, '--json')
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted['groups']['prompts']['trainable'] == 0
    assert counted['total']['trainable'] > 0
