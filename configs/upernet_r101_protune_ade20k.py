# UperNet, ResNet-101 (v1c), ADE20K, Pro-tuning: frozen backbone, prompts and heads train.
_base_ = './upernet_r50_protune_ade20k.py'

model = dict(
    backbone=dict(backbone=dict(depth=101), pretrained='open-mmlab://resnet101_v1c'))
