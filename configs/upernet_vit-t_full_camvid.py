# UperNet, ViT-Tiny/16, CamVid, full fine-tuning: a comparison that takes minutes on a CPU core.
_base_ = [
    'mmseg::_base_/models/upernet_vit-b16_ln_mln.py',
    './_base_/camvid.py',
    './_base_/schedule_camvid.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(240, 320)),
    pretrained=None,
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
    neck=dict(in_channels=[192, 192, 192, 192], out_channels=192),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=128, num_classes=11),
    auxiliary_head=dict(in_channels=192, channels=64, num_classes=11))

# For the batch of 4.
auto_scale_lr = dict(enable=False, base_batch_size=4)
