"""Small networks, prompted, with what tests ask of them."""
import copy

import torch
from torch import nn

from mmprotune.lean import restore
from mmprotune.lean.base import LeanLayer
from mmprotune.lean.dry_run import tensors_in
from mmprotune.lean.memory import KeptBytes
from tests.conftest import RESNET18, build, wake

TINY = dict(embed_dim=48, depth=4, num_heads=4)
SMALL = dict(
    resnet=dict(type='mmdet.ResNet', depth=50, base_channels=16),
    swin=dict(type='mmdet.SwinTransformer', embed_dims=24, depths=(2, 2, 2, 2),
              num_heads=(1, 2, 4, 8), drop_path_rate=0.),
    mmpretrain_swin=dict(type='mmpretrain.SwinTransformer', arch=dict(
        embed_dims=24, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8]), drop_path_rate=0.,
        pad_small_map=True, out_indices=(0, 1, 2, 3)),
    vit=dict(type='mmseg.VisionTransformer', img_size=(96, 64), patch_size=8, embed_dims=48,
             num_layers=8, num_heads=4, out_indices=(1, 3, 5, 7), drop_path_rate=0.),
    mmpretrain_vit=dict(type='mmpretrain.VisionTransformer', patch_size=8, img_size=(96, 64),
                        out_type='featmap', arch=dict(embed_dims=48, num_layers=4, num_heads=4,
                                                      feedforward_channels=96)),
    eva02=dict(type='mmpretrain.ViTEVA02', patch_size=8, img_size=(96, 64), sub_ln=True,
               out_type='featmap', out_indices=(0, 1, 2, 3), final_norm=False,
               arch=dict(embed_dims=48, num_layers=4, num_heads=4, feedforward_channels=128)),
    sam=dict(type='mmpretrain.ViTSAM', patch_size=8, img_size=(96, 64), window_size=5,
             out_indices=(0, 1, 2, 3), out_channels=16, arch=dict(
                 embed_dims=48, num_layers=4, num_heads=4, feedforward_channels=96,
                 global_attn_indexes=[1, 3])),
    timm_vit=dict(type='mmpretrain.TIMMBackbone', model_name='vit_small_patch14_reg4_dinov2',
                  img_size=(96, 64), patch_size=8, **TINY),
    timm_eva02=dict(type='mmpretrain.TIMMBackbone', model_name='eva02_base_patch14_224',
                    img_size=(96, 64), patch_size=8, **TINY),
    dinov3=dict(type='mmpretrain.TIMMBackbone', model_name='vit_small_plus_patch16_dinov3',
                img_size=(96, 64), patch_size=8, **TINY),
    convnext=dict(type='mmpretrain.ConvNeXt', out_indices=(0, 1, 2, 3), drop_path_rate=0.,
                  gap_before_final_norm=False,
                  arch=dict(depths=[1, 1, 2, 1], channels=[16, 24, 32, 48])),
    hrnet=dict(type='mmpretrain.HRNet', arch='w18'),
    cspnext=dict(type='mmdet.CSPNeXt', deepen_factor=0.33, widen_factor=0.25),
    pvt=dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=16, num_layers=[1, 1, 1, 1],
             num_heads=[1, 2, 4, 8], drop_path_rate=0.),
    mit=dict(type='mmseg.MixVisionTransformer', embed_dims=16, num_layers=[1, 1, 1, 1],
             drop_path_rate=0.),
    mobilenet=dict(type='mmseg.MobileNetV2', widen_factor=0.5),
    mscan=dict(type='mmseg.MSCAN', embed_dims=[16, 32, 48, 64], depths=[1, 1, 1, 1],
               drop_path_rate=0.),
    regnet=dict(type='mmpretrain.RegNet', arch='regnetx_400mf', out_indices=(0, 1, 2, 3)),
    efficientnet=dict(type='mmpretrain.EfficientNet', arch='b0', out_indices=(2, 3, 4, 5)),
    mobileone=dict(type='mmpretrain.MobileOne', arch='s0', out_indices=(0, 1, 2, 3)),
    bisenet=dict(type='mmseg.BiSeNetV1', spatial_channels=(64, 64, 64, 128),
                 context_channels=(128, 256, 512), backbone_cfg=dict(
                     type='mmseg.ResNetV1c', depth=18, in_channels=3, num_stages=4,
                     out_indices=(0, 1, 2, 3), dilations=(1, 1, 1, 1),
                     strides=(1, 2, 2, 2), norm_cfg=dict(type='BN'))),
    timm=dict(type='mmpretrain.TIMMBackbone', model_name='resnet18', features_only=True,
              pretrained=False),
)


def prompted(backbone=RESNET18, lean=True, **kwargs):
    """A prompted backbone whose prompts and norms are not at their start."""
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                       lean=lean, **kwargs))
    wake(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    model.refresh_fingerprint()
    return model.train()


def ordinary(model):
    """The same model, its layers ordinary again."""
    model = copy.deepcopy(model)
    restore(model)
    assert not any(isinstance(m, LeanLayer) for m in model.modules())
    return model


def outputs_of(model, x):
    return list(tensors_in(model(x)))


def step(model, x):
    """Outputs, and the gradients of prompts and input, of a fixed random loss."""
    x = x.clone().requires_grad_()
    outputs = outputs_of(model, x)
    generator = torch.Generator().manual_seed(2)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum()
               for o in outputs)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss.backward()
    gradients = {'input': x.grad, **{n: p.grad.clone() for n, p in trained.items()}}
    return [o.detach() for o in outputs], gradients


def distance(found, expected):
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(found, expected))


def images(*shape, dtype=torch.float32, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kept_by(model, x):
    with KeptBytes(model) as kept:
        output = model(x)
    counted = kept.by_module()
    del output
    return counted
