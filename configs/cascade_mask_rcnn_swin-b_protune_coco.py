# Cascade Mask R-CNN, Swin-B, COCO, 3x: the setting in which PEFT methods for detection are compared
# (Mona and V-PETL Bench publish theirs in it). Pro-tuning: frozen backbone, prompts and head train.
_base_ = [
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_ms-3x_coco.py',
    './_base_/protune.py',
]

pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone=dict(
            type='SwinTransformer',
            embed_dims=128,
            depths=[2, 2, 18, 2],
            num_heads=[4, 8, 16, 32],
            window_size=7,
            drop_path_rate=0.3,
            convert_weights=True,
            init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
        prompt=dict(type='mmprotune.PromptBlock')),
    neck=dict(in_channels=[128, 256, 512, 1024]))

# Those comparisons train with AdamW, 1e-4, decay 0.05 (none on norms); biases are exempt here too.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
