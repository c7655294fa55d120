# CIFAR-100, as CIFAR-10.
_base_ = './cls_data_cifar10.py'

num_classes = 100
data = dict(type='CIFAR100', data_root='data/cifar100')
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
shifts = dict(_delete_=True)
