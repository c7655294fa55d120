# ResNet-50. The classifier reads the mean over the last stage's prompted map.
_base_ = 'mmpretrain::_base_/models/resnet50.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
    head=dict(topk=(1, )))
# Of the pre-trained file, RGB; what LoadImageFromFile returns is BGR.
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
