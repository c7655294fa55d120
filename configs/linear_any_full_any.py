# Full fine-tuning with a linear classifier, on any backbone and data set that _base_/cls_* has:
#   MMPROTUNE_BACKBONE=swin-b MMPROTUNE_DATA=flowers102 python tools/train.py configs/linear_any_…
_base_ = [
    './_base_/cls_backbone_{{$MMPROTUNE_BACKBONE:r50}}.py',
    './_base_/cls_data_{{$MMPROTUNE_DATA:cifar10}}.py',
    './_base_/cls_schedule.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(head=dict(num_classes={{_base_.num_classes}}))
data_preprocessor = dict(
    num_classes={{_base_.num_classes}},
    mean={{_base_.mean}},
    std={{_base_.std}},
    to_rgb={{_base_.to_rgb}})
work_dir = 'work_dirs/linear_{{$MMPROTUNE_BACKBONE:r50}}_full_{{$MMPROTUNE_DATA:cifar10}}'
