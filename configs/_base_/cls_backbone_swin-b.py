# Swin-B. The classifier reads the mean over the last stage's prompted map, after the final norm.
_base_ = './cls_backbone_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        arch='base',
        img_size=224,
        # Below 224 pixels the last maps are smaller than a window.
        pad_small_map=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/swin-transformer/convert/swin_base_patch4_window7_224_22kto1k-f967f799.pth',
            prefix='backbone.')),
    head=dict(in_channels=1024))
