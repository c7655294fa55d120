# CIFAR-10 as image files, train/CLASS/*.jpg and test/CLASS/*.jpg: a copy, or a part.
_base_ = './cls_data_cifar10.py'

load = dict(type='LoadImageFromFile')
data = dict(type='CustomDataset', data_root='data/cifar10')
train_dataloader = dict(
    dataset=dict(
        _delete_=True, **data, data_prefix='train',
        pipeline=[load, *_base_.train_pipeline]))
val_dataloader = dict(
    dataset=dict(
        _delete_=True, **data, data_prefix='test', pipeline=[load, *_base_.test_pipeline]))
test_dataloader = val_dataloader
