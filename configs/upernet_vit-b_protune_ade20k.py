# UperNet, ViT-B/16, ADE20K, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmseg::vit/vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py', './_base_/protune.py']

# The segmentor would hand `pretrained` on to the outer backbone only; it belongs to the inner one.
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        pretrained={{_base_.model.pretrained}},
        prompt=dict(type='mmprotune.PromptBlock')))
