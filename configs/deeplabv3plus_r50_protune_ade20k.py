# DeepLabV3+, ResNet-50 (v1c, output stride 8), ADE20K, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py', './_base_/protune.py']

# The segmentor would hand `pretrained` on to the outer backbone only; it belongs to the inner one.
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        pretrained={{_base_.model.pretrained}},
        prompt=dict(type='mmprotune.PromptBlock')))

# AdamW, for the reason given in _base_/schedule_160k_adamw.py.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01))
