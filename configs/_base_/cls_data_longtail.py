# A long-tailed training set, of any of the cls_data_*.py: MMPROTUNE_LONGTAIL names it, and
# MMPROTUNE_FACTOR is the imbalance factor. The test set stays as it is.
_base_ = './cls_data_{{$MMPROTUNE_LONGTAIL:cifar10}}.py'

long_tailed = dict(
    type='mmprotune.LongTailedDataset',
    factor={{'$MMPROTUNE_FACTOR:100'}},
    profile='exp',
    dataset={{_base_.train_dataloader.dataset}})
train_dataloader = dict(dataset=dict(_delete_=True, **long_tailed))
val_evaluator = [
    *_base_.val_evaluator,
    dict(type='mmprotune.ShotAccuracy', train_dataset=long_tailed)
]
test_evaluator = val_evaluator
