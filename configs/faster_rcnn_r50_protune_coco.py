# Faster R-CNN, ResNet-50-FPN, COCO, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['./faster_rcnn_r50_full_coco.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        prompt=dict(type='mmprotune.PromptBlock')))
