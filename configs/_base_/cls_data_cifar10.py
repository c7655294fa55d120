# CIFAR-10, enlarged to the size that the backbone was pre-trained at.
_base_ = './cls_data.py'

num_classes = 10
# MMPretrain's class hands the 32-pixel images over decoded, as RGB.
to_rgb = False
size = {{_base_.size}}
train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='Resize', scale=size, interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs')
]
test_pipeline = [
    dict(type='Resize', scale=size, interpolation='bicubic'),
    dict(type='PackInputs')
]
data = dict(type='CIFAR10', data_root='data/cifar10')
train_dataloader = dict(dataset=dict(**data, split='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**data, split='test', pipeline=test_pipeline))
test_dataloader = val_dataloader
