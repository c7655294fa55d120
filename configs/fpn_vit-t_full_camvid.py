# Semantic FPN on four depths of a ViT-Tiny/16, CamVid, full fine-tuning.
_base_ = './fpn_r18_full_camvid.py'

model = dict(
    # mmpretrain's ViT, for its zoo has a ViT-Tiny.
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch='deit-tiny',
        img_size=(240, 320),
        out_indices=(2, 5, 8, 11),
        out_type='featmap',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/'
            'deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth',
            prefix='backbone.')),
    neck=dict(
        _delete_=True, type='MultiLevelNeck', in_channels=[192, 192, 192, 192], out_channels=64,
        scales=[4, 2, 1, 0.5]))
