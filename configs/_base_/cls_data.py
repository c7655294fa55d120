# Pipelines and loaders that the cls_data_*.py share; each adds its dataset and three facts. Images
# are square, MMPROTUNE_SIZE pixels wide (224 unless that environment variable is set).
size = {{'$MMPROTUNE_SIZE:224'}}
# What LoadImageFromFile returns is BGR.
to_rgb = True
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=size, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge', scale=size * 8 // 7, edge='short', backend='pillow',
        interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=size),
    dict(type='PackInputs')
]
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    dataset=dict(pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    dataset=dict(pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = [dict(type='Accuracy', topk=(1, ))]
test_evaluator = val_evaluator
