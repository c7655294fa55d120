# ConvNeXt-B. The backbone itself takes the mean over the last stage's prompted map, then its final
# norm; the classifier reads that.
_base_ = './cls_backbone_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='ConvNeXt',
        arch='base',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/convnext/convnext-base_in21k-pre-3rdparty_32xb128_in1k_20220124-eb2d6ada.pth',
            prefix='backbone.')),
    neck=None,
    head=dict(in_channels=1024))
