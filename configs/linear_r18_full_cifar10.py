# ResNet-18 with a linear classifier on CIFAR-10 as image files, 64 pixels wide, full fine-tuning:
# small enough to compare many methods on a CPU core (tools/benchmark_methods.py wraps it).
_base_ = [
    './_base_/cls_backbone_r18.py',
    './_base_/cls_data_cifar10_folder.py',
    './_base_/cls_schedule.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    # Statistics of BatchNorm stand still, as they do in a frozen backbone: methods differ in what
    # trains alone.
    backbone=dict(norm_eval=True),
    head=dict(num_classes={{_base_.num_classes}}))
data_preprocessor = dict(num_classes={{_base_.num_classes}})
size = 64
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='Resize', scale=size, interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, interpolation='bicubic'),
    dict(type='PackInputs')
]
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

epochs = 2
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', T_max=epochs, end=epochs, convert_to_iter_based=True)
]
train_cfg = dict(max_epochs=epochs, val_interval=epochs)
auto_scale_lr = dict(base_batch_size=32)
