# ResNet-50 with a linear classifier on CIFAR-10, 64 pixels wide, full fine-tuning.
_base_ = './linear_r18_full_cifar10.py'

model = dict(
    backbone=dict(depth=50, init_cfg=dict(checkpoint='torchvision://resnet50')),
    head=dict(in_channels=2048))
