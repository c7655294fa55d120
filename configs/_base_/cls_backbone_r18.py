# ResNet-18, as ResNet-50.
_base_ = './cls_backbone_r50.py'

model = dict(
    backbone=dict(depth=18, init_cfg=dict(checkpoint='torchvision://resnet18')),
    head=dict(in_channels=512))
