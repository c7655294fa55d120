# RetinaNet, ResNet-50-FPN, COCO, 1x, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        prompt=dict(type='mmprotune.PromptBlock')))

# AdamW, for the reason given in _base_/schedule_1x_adamw.py; a one-stage head takes half the rate.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
