# Mask R-CNN, Swin-S, COCO, 3x, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        prompt=dict(type='mmprotune.PromptBlock')))

# Full precision unless --amp asks for less.
optim_wrapper = dict(type='OptimWrapper')
