# ViT-Ti/16, as ViT-B/16, with DeiT's weights.
_base_ = './cls_backbone_vit-b.py'

model = dict(
    backbone=dict(
        arch='deit-t',
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth')),
    head=dict(in_channels=192))
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
