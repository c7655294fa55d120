# Semantic FPN, ResNet-50, CamVid, full fine-tuning.
_base_ = './fpn_r18_full_camvid.py'

model = dict(
    backbone=dict(depth=50, init_cfg=dict(checkpoint='torchvision://resnet50')),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
