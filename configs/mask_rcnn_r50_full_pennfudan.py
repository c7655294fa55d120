# Mask R-CNN, ResNet-50-FPN, Penn-Fudan, full fine-tuning: a comparison that takes minutes.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    './_base_/pennfudan_instance.py',
    './_base_/schedule_1x_adamw.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    # A photo shows one to eight people: 64 regions an image instead of 512, a quarter of the time.
    train_cfg=dict(rcnn=dict(sampler=dict(num=64))))

# 6 epochs of 32 iterations: 192 steps of batch 4.
max_epochs = 6
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=max_epochs, milestones=[4, 5], gamma=0.1)
]
# For the batch of 4, not of 16.
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_epochs))
