"""What prompts cost: parameters, and arithmetic at the shipped scale."""
import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import build

ROOT = Path(__file__).resolve().parents[1]
SIZE = 192  # pixels; convolutions are linear in the area, so the shipped scale follows from it
SHIPPED = (800, 1344)


def _mask_rcnn(prompted: bool):
    cfg = Config.fromfile(str(ROOT / 'configs/mask_rcnn_r50_protune_coco.py'))
    model = copy.deepcopy(cfg.model)
    model.backbone.backbone.init_cfg = None
    model.backbone['freeze'] = 'all'
    if not prompted:
        model.backbone = model.backbone.backbone
    return build(model).eval()


def _flops(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.fixture(scope='module')
def models():
    with DefaultScope.overwrite_default_scope('mmdet'):
        return {name: _mask_rcnn(name == 'prompted') for name in ('prompted', 'stock')}


def test_prompts_are_at_most_13_percent_of_resnet50(models):
    backbone = models['prompted'].backbone
    prompts = sum(p.numel() for p in backbone.prompts.parameters())
    assert 0 < prompts <= 0.13 * sum(p.numel() for p in backbone.backbone.parameters())


def test_inference_costs_at_most_1_15_times_the_stock_models(models):
    image = torch.zeros(1, 3, SIZE, SIZE)
    per_area = {
        name: _flops(lambda model=model: model.rpn_head(model.extract_feat(image)))
        for name, model in models.items()
    }
    # 1000 regions get a box, 100 boxes a mask, whatever the image's size.
    head = models['stock'].roi_head
    fixed = _flops(lambda: (head.bbox_head(torch.zeros(1000, 256, 7, 7)),
                            head.mask_head(torch.zeros(100, 256, 14, 14))))
    area = SHIPPED[0] * SHIPPED[1] / SIZE**2
    total = {name: flops * area + fixed for name, flops in per_area.items()}
    print(total)
    assert 1 < total['prompted'] / total['stock'] <= 1.15
