# CIFAR-10 with a long-tailed training set. The test set stays as it is.
_base_ = './cls_data_cifar10.py'

long_tailed = dict(
    type='mmprotune.LongTailedDataset',
    factor=100,
    profile='exp',
    dataset={{_base_.train_dataloader.dataset}})
train_dataloader = dict(dataset=dict(_delete_=True, **long_tailed))
val_evaluator = [
    *_base_.val_evaluator,
    dict(type='mmprotune.ShotAccuracy', train_dataset=long_tailed)
]
test_evaluator = val_evaluator
