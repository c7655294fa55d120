# Mask R-CNN, ResNet-50-FPN, COCO, head only: the frozen backbone without prompts.
_base_ = './mask_rcnn_r50_protune_coco.py'

model = dict(backbone=dict(prompt=None))
