import pytest
import torch
from torch import nn

from mmprotune import FrozenSnapshot, FrozenTensorsChanged, audit
from tests.conftest import build
from tests.test_freezing.test_freeze import network


def test_audit_passes_a_model_in_order(prompted_cfg):
    model = build(prompted_cfg).train()
    audit(model, FrozenSnapshot(model), training=True)


def _nudge(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] += 1


@pytest.mark.parametrize('breaks, match', [
    (lambda m: _nudge(m.backbone.layer3[0].conv1.weight),
     r'frozen tensors moved: backbone\.layer3\.0\.conv1\.weight$'),
    (lambda m: _nudge(m.backbone.bn1.running_mean), r'moved: backbone\.bn1\.running_mean$'),
    (lambda m: m.backbone.conv1.weight.requires_grad_(True),
     r'backbone\.conv1\.weight is declared frozen, but its requires_grad is True'),
    (lambda m: setattr(m.backbone.conv1.weight, 'grad', torch.zeros(8, 3, 7, 7)),
     'conv1.weight is declared frozen, but has a gradient'),
    (lambda m: m.backbone.layer1[0].bn1.train(),
     r'backbone\.layer1\.0\.bn1 \(BatchNorm2d\) is frozen, but in training mode'),
    (lambda m: m.eval(), 'in eval mode, expected training'),
])
def test_audit_names_what_moved(prompted_cfg, breaks, match):
    model = build(prompted_cfg).train()
    snapshot = FrozenSnapshot(model)
    breaks(model)
    with pytest.raises(FrozenTensorsChanged, match=match):
        audit(model, snapshot, training=True)


def test_audit_lets_a_part_predict_that_does_not_train(prompted_cfg):
    """A mean teacher beside its student."""
    model = nn.ModuleDict(dict(student=build(prompted_cfg), teacher=build(prompted_cfg))).train()
    model['teacher'].requires_grad_(False).eval()
    audit(model, FrozenSnapshot(model), training=True)
    model['student'].eval()
    with pytest.raises(FrozenTensorsChanged, match='student is in eval mode, expected training'):
        audit(model, training=True)


def test_audit_finds_the_backbone_inside_a_model(prompted_cfg):
    detector = nn.Module()
    detector.backbone = build(prompted_cfg)
    snapshot = FrozenSnapshot(detector)
    _nudge(detector.backbone.backbone.conv1.weight)
    assert snapshot.moved(detector) == ['backbone.backbone.conv1.weight']


def test_audit_needs_a_prompted_backbone():
    with pytest.raises(ValueError, match='got Sequential without one'):
        audit(network())
