# Semantic FPN, ResNet-18, CamVid, full fine-tuning: small enough to compare many methods on a CPU
# core (tools/benchmark_methods.py wraps it).
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    './_base_/camvid.py',
    './_base_/schedule_camvid.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(240, 320)),
    pretrained=None,
    # The ResNet that most pre-trained files are of, not v1c. Its BatchNorm statistics stand still:
    # four crops are too few to estimate them from.
    backbone=dict(
        type='ResNet',
        depth=18,
        norm_cfg=dict(type='BN'),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=64),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=64, num_classes=11))

max_iters = 400
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=20, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters))
auto_scale_lr = dict(base_batch_size=4)
