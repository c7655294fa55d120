# UperNet, BEiT-B, ADE20K, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py', './_base_/protune.py']

# The segmentor would hand `pretrained` on to the outer backbone only; it belongs to the inner one.
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        pretrained={{_base_.model.pretrained}},
        prompt=dict(type='mmprotune.PromptBlock')))

# The stock recipe lets the learning rate fall with the depth of the layer. Here the backbone is
# frozen, and prompts at every depth start from the same zero.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-5, betas=(0.9, 0.999), weight_decay=0.05))
