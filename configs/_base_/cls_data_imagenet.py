# ImageNet-1k.
_base_ = './cls_data.py'

num_classes = 1000
data = dict(type='ImageNet', data_root='data/imagenet')
train_dataloader = dict(dataset=dict(**data, split='train'))
val_dataloader = dict(dataset=dict(**data, split='val'))
test_dataloader = val_dataloader
