"""Which part of a model kept bytes are counted for."""
from torch import nn

from mmprotune.benchmark.measuring import stage_finder
from tests.conftest import RESNET18, build


def test_parts_of_a_model():
    model = nn.Module()
    model.backbone = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18,
                                freeze='all', lean=False))
    part = stage_finder(model)
    names = {
        'backbone.backbone.conv1': 'stage1', 'backbone.backbone.layer1.1.relu': 'stage1',
        'backbone.layer2.0.conv1': 'stage2', 'backbone.backbone.layer4': 'stage4',
        'backbone.module.layer3.0.conv1': 'stage3', 'backbone.prompts.stage1.reduce': 'prompts',
        'neck.fpn': 'neck', 'roi_head.bbox_head': 'head', '': 'head',
    }
    assert {path: part(path) for path in names} == names
