# Mask R-CNN, ResNet-50-FPN, COCO, full fine-tuning: what the other two are compared with.
# The parts of mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py, the optimizer excepted.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    './_base_/schedule_1x_adamw.py',
    'mmdet::_base_/default_runtime.py',
]
