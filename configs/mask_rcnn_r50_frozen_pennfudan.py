# Mask R-CNN, ResNet-50-FPN, Penn-Fudan, head only: the frozen backbone without prompts.
_base_ = './mask_rcnn_r50_protune_pennfudan.py'

model = dict(backbone=dict(prompt=None))
