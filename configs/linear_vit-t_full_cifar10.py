# ViT-Ti/16 with a linear classifier on CIFAR-10, 96 pixels wide (36 tokens), full fine-tuning.
_base_ = './linear_r18_full_cifar10.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        arch='deit-t',
        img_size=96,
        patch_size=16,
        out_type='avg_featmap',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/'
            'deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth',
            prefix='backbone.')),
    neck=None,
    head=dict(in_channels=192))
size = 96
resize = dict(type='Resize', scale=size, interpolation='bicubic')
train_pipeline = [*_base_.train_pipeline[:2], resize, *_base_.train_pipeline[3:]]
test_pipeline = [*_base_.test_pipeline[:1], resize, *_base_.test_pipeline[2:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
