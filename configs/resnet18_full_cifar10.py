# ResNet-18 with a linear classifier on CIFAR-10, enlarged to 224 pixels: full fine-tuning.
_base_ = [
    './_base_/cls_backbone_r18.py',
    './_base_/cls_data_cifar10.py',
    './_base_/cls_schedule.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(head=dict(num_classes={{_base_.num_classes}}))
data_preprocessor = dict(num_classes={{_base_.num_classes}}, to_rgb=False)
