# CIFAR-10, enlarged to the size that the backbone was pre-trained at. MMPretrain's class hands the
# 32-pixel images over decoded, as RGB: who stands on this says data_preprocessor=dict(to_rgb=False).
_base_ = './cls_data.py'

num_classes = 10
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

# For tools/test_robustness.py --scenario ood: CIFAR-10.1, and CIFAR-10-C at its strongest. Its files
# hold the five severities one after another; other rows are another severity.
classes = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
arrays = dict(type='mmprotune.NumpyImages', classes=classes)
shifts = dict(
    cifar10_1=dict(
        dataset=dict(
            **arrays, data_root='data/cifar10.1', images='cifar10.1_v6_data.npy',
            labels='cifar10.1_v6_labels.npy'),
        class_map='names'))
for corruption in ('gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur',
                   'motion_blur', 'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast',
                   'elastic_transform', 'pixelate', 'jpeg_compression'):
    shifts[f'cifar10_c-{corruption}'] = dict(
        dataset=dict(
            **arrays, data_root='data/CIFAR-10-C', images=f'{corruption}.npy', labels='labels.npy',
            rows=(40000, 50000)),
        class_map='names')
