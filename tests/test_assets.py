"""Real pre-trained files and real images; skipped without MMPROTUNE_ASSETS."""
import subprocess
import sys

import pytest
import torch
from mmengine.registry import DefaultScope

from mmprotune import FrozenSnapshot, audit
from tests.conftest import build
from tests.detection import detector_cfg, run

pytestmark = pytest.mark.assets


@pytest.fixture(scope='module')
def weights(assets, tmp_path_factory):
    """Folder of ImageNet-trained state dicts."""
    folder = tmp_path_factory.mktemp('weights')
    subprocess.run([sys.executable, str(assets / 'tools/decode_weights.py'), '--out', str(folder)],
                   check=True, capture_output=True, timeout=300)
    return folder


def _prompted(backbone, file, **init_cfg):
    return build(dict(
        type='mmprotune.PromptedBackbone',
        backbone=dict(backbone, init_cfg=dict(type='Pretrained', checkpoint=str(file),
                                              **init_cfg))))


@pytest.mark.parametrize('cfg, file', [
    (dict(type='mmdet.ResNet', depth=50, style='pytorch'), 'resnet50_in1k_pqf.pth'),
    (dict(type='mmdet.ResNet', depth=18, style='pytorch'), 'resnet18_in1k_pqf.pth'),
    (dict(type='mmseg.MobileNetV2', conv_cfg=dict(type='Conv2dAdaptivePadding')),
     'mobilenet_v2_in1k_tflite.pth'),
    # 224 px as trained; the table of positions fits, and so everything is filled.
    (dict(type='mmpretrain.VisionTransformer', arch='deit-t', img_size=224, patch_size=16,
          out_type='featmap', out_indices=(2, 5, 8, 11)), 'vit_tiny_p16_in1k_mmpretrain.pth'),
    # Another image size: the position table is resized to fit, and still counts as filled.
    (dict(type='mmpretrain.VisionTransformer', arch='deit-t', img_size=320, patch_size=16,
          out_type='featmap', out_indices=(2, 5, 8, 11)), 'vit_tiny_p16_in1k_mmpretrain.pth'),
], ids=['r50', 'r18', 'mobilenetv2', 'vit-t', 'vit-t-320'])
def test_a_real_file_fills_everything(weights, cfg, file):
    model = _prompted(cfg, weights / file)
    assert not [n for n, p in model.backbone.named_parameters() if p.requires_grad]
    state = torch.load(weights / file, weights_only=True)
    state = state.get('state_dict', state)
    same = [n for n, t in model.backbone.state_dict().items()
            if n in state and torch.equal(state[n], t)]
    assert len(same) >= 0.9 * len(model.frozen_names - {
        n for n in model.frozen_names if n.endswith('num_batches_tracked')})


def test_what_a_real_file_leaves_trains(weights, tmp_path):
    """A file without the last norm, as ImageNet files lack the output norms of segmentors."""
    state = torch.load(weights / 'vit_tiny_p16_in1k_mmpretrain.pth', weights_only=True)
    state = state.get('state_dict', state)
    file = tmp_path / 'vit.pth'
    torch.save({k: v for k, v in state.items() if not k.startswith('ln1.')}, file)
    model = _prompted(dict(type='mmpretrain.VisionTransformer', arch='deit-t', img_size=224,
                           patch_size=16, out_type='featmap'), file)
    assert {n for n, p in model.backbone.named_parameters() if p.requires_grad} == {
        'ln1.weight', 'ln1.bias'}
    assert 'backbone.ln1.weight' in model.state_dict()


def test_the_file_of_another_backbone_is_an_error(weights):
    from mmprotune.errors import PretrainedFileError
    with pytest.raises(PretrainedFileError, match='90%; shapes that differ: layer1'):
        _prompted(dict(type='mmdet.ResNet', depth=50), weights / 'resnet18_in1k_pqf.pth')


def test_safetensors(weights, tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    state = torch.load(weights / 'resnet18_in1k_pqf.pth', weights_only=True)
    safetensors.save_file({k: v.contiguous() for k, v in state.items()},
                          tmp_path / 'r18.safetensors')
    model = _prompted(dict(type='mmdet.ResNet', depth=18), tmp_path / 'r18.safetensors')
    assert torch.equal(model.backbone.conv1.weight, state['conv1.weight'])


def test_timm_door(tmp_path):
    """timm loads in its constructor, from a file of its own format."""
    timm = pytest.importorskip('timm')
    file = str(tmp_path / 'vit.pth')
    torch.manual_seed(0)
    donor = timm.create_model('vit_tiny_patch16_224')
    torch.save(donor.state_dict(), file)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = build(dict(
            type='mmprotune.PromptedBackbone',
            backbone=dict(type='mmpretrain.TIMMBackbone', model_name='vit_tiny_patch16_224',
                          checkpoint_path=file)))
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert torch.equal(model.backbone.timm_model.pos_embed, donor.pos_embed)
    assert len(model.stages) == 4


def test_real_coco_images_train_prompts_only(assets, weights, tmp_path):
    """Real photos, crowds and all 80 classes; a ResNet-18 from ImageNet; two iterations."""
    backbone = dict(type='mmprotune.PromptedBackbone', backbone=dict(
        type='mmdet.ResNet', depth=18, norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint=str(weights / 'resnet18_in1k_pqf.pth'))))
    cfg = detector_cfg(backbone, assets / 'coco', tmp_path)
    cfg.model.neck.in_channels = [64, 128, 256, 512]
    cfg.model.roi_head.bbox_head.num_classes = 80
    for loader, split in (('train_dataloader', 'train'), ('val_dataloader', 'val'),
                          ('test_dataloader', 'val')):
        cfg[loader].dataset.update(
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'), indices=4)
        del cfg[loader].dataset['metainfo']  # all of COCO's classes
    cfg.train_cfg.update(max_epochs=1, val_interval=10)
    cfg.val_evaluator.ann_file = str(assets / 'coco/annotations/instances_val2017.json')
    runner = run(cfg)
    audit(runner.model, FrozenSnapshot(runner.model))
    prompts = runner.model.backbone.prompts
    assert all(block.expand.weight.abs().sum() > 0 for block in prompts.values())
