# Mask R-CNN, Swin-T, COCO, 1x, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        prompt=dict(type='mmprotune.PromptBlock')))
