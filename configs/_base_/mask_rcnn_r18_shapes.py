# Mask R-CNN on shapes that tools/quickstart.py draws, small enough for two CPU cores. The data
# and the pre-trained backbone come from there, too; where they lie elsewhere, --cfg-options must
# name each key below that holds a path.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']

data_root = 'work_dirs/quickstart/shapes/'
metainfo = dict(
    classes=('disc', 'square', 'triangle', 'star', 'cross'),
    palette=[(230, 85, 60), (60, 150, 230), (250, 190, 50), (70, 185, 110), (170, 100, 220)])
size = (160, 160)
num_classes = 5
channels = 64

model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        init_cfg=dict(checkpoint='work_dirs/quickstart/resnet18_drawn.pth')),
    # A few hundred steps from scratch: with normalisation the neck and the heads learn sooner.
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=channels, norm_cfg=dict(type='BN')),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        # Shapes are 30 to 80 pixels wide; the stock limit of 112 would take all from one level.
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2), out_channels=channels, finest_scale=28),
        bbox_head=dict(
            in_channels=channels, fc_out_channels=256, num_classes=num_classes,
            reg_class_agnostic=True),
        mask_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=1), out_channels=channels, finest_scale=28),
        mask_head=dict(
            num_convs=2, in_channels=channels, conv_out_channels=channels,
            num_classes=num_classes)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32, pos_fraction=0.5))),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(max_per_img=20)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='RandomFlip', prob=[0.3, 0.3], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
# No worker processes: the cores are busy with the model.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        metainfo=metainfo,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='val.json',
        data_prefix=dict(img='val/'),
        metainfo=metainfo,
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'val.json')
test_evaluator = val_evaluator

max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(
        type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, eta_min=1e-5,
        convert_to_iter_based=True)
]
# For the batch of 8, not of 16.
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(
    # A run of a minute is started again rather than resumed: no optimizer in the file.
    checkpoint=dict(interval=max_epochs, save_optimizer=False, save_param_scheduler=False),
    logger=dict(interval=20))
