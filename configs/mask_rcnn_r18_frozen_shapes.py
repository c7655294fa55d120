# Mask R-CNN, small ResNet-18-FPN, the drawn shapes, head only: no prompts, all else the same.
_base_ = './mask_rcnn_r18_protune_shapes.py'

model = dict(backbone=dict(prompt=None))
