
import pytest
from torch import nn

from mmprotune.lean import restore
from mmprotune.lean.memory import KeptBytes
from tests.conftest import build
from tests.test_lean.networks import SMALL, images, kept_by, prompted

# The architectures and the sizes of the promise, (lean / full, lean / naive) at most.
PROMISED = {
    'ResNet-50': (dict(type='mmdet.ResNet', depth=50), 0.25, 0.20),
    'ConvNeXt-T': (dict(type='mmpretrain.ConvNeXt', arch='tiny', out_indices=[0, 1, 2, 3],
                        gap_before_final_norm=False), 0.18, 0.50),
    'Swin-T': (dict(type='mmdet.SwinTransformer', embed_dims=96, depths=(2, 2, 6, 2),
                    num_heads=(3, 6, 12, 24)), 0.23, 0.55),
    'ViT-B': (dict(type='mmseg.VisionTransformer', img_size=(512, 512), embed_dims=768,
                   num_layers=12, num_heads=12, out_indices=(2, 5, 8, 11)), 0.24, 0.40),
}


@pytest.mark.parametrize('name', [
    'ResNet-50', *(pytest.param(n, marks=pytest.mark.slow) for n in PROMISED if n != 'ResNet-50')])
def test_kept_bytes_at_512(name):
    cfg, of_full, of_naive = PROMISED[name]
    x = images(2, 3, 512, 512)
    full = build(cfg)
    full.train()
    full_bytes = sum(kept_by(full, x).values())
    del full
    model = prompted(cfg)
    lean_bytes = sum(kept_by(model, x).values())
    restore(model)
    naive_bytes = sum(kept_by(model, x).values())
    assert lean_bytes <= of_full * full_bytes
    assert lean_bytes <= of_naive * naive_bytes


# Places of prompts, and their prompts' parameters and kept bytes at most, of full fine-tuning; and
# options of lean.
PLACES = [('ResNet-50', 'narrow', 0.03, 0.20, {}), ('ConvNeXt-T', 'branches', 0.13, 0.36, {}),
          ('ViT-B', 'branches', 0.13, 0.36, {}), ('Swin-T', 'blocks', 0.13, 0.36, {}),
          ('Swin-T', 'branches', 0.13, 0.39, {}),
          ('Swin-T', 'branches', 0.13, 0.36, dict(recompute=0.15))]


@pytest.mark.parametrize('name, insert, share, of_full, lean', [
    place if place[0] == 'ResNet-50' else pytest.param(*place, marks=pytest.mark.slow)
    for place in PLACES], ids=lambda value: str(value))
def test_kept_bytes_of_prompts_at_other_places(name, insert, share, of_full, lean):
    cfg = PROMISED[name][0]
    x = images(2, 3, 512, 512)
    full = build(cfg)
    parameters = sum(p.numel() for p in full.parameters())
    full.train()
    full_bytes = sum(kept_by(full, x).values())
    del full
    model = prompted(cfg, insert=insert, lean=lean)
    assert sum(p.numel() for p in model.prompts.parameters()) <= share * parameters
    assert sum(kept_by(model, x).values()) <= of_full * full_bytes


def test_the_backbone_keeps_bits_and_the_prompts_their_feature():
    """ResNet's own share: one bit for each output of a ReLU after the first prompt."""
    model = prompted(SMALL['resnet'])
    elements = []
    for path, module in model.backbone.named_modules():
        if isinstance(module, nn.ReLU) and path.startswith(('layer2', 'layer3', 'layer4')):
            module.register_forward_hook(lambda m, a, y: elements.append(y.numel()))
    counted = kept_by(model, images(2, 3, 96, 64))
    relu = sum(n for path, n in counted.items() if path.endswith('relu'))
    assert relu == sum(-(-n // 8) for n in elements)
    backbone = sum(n for path, n in counted.items() if path.startswith('backbone'))
    assert backbone - relu < 0.05 * sum(counted.values())


def test_head_only_builds_no_graph():
    model = prompted(prompt=None)
    with KeptBytes(model) as kept:
        outputs = model(images(1, 3, 64, 64))
    assert kept.total() == 0 and not any(o.requires_grad for o in outputs)
