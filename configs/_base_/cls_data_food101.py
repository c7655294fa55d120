# Food-101.
_base_ = './cls_data.py'

num_classes = 101
data = dict(type='Food101', data_root='data/food-101')
train_dataloader = dict(dataset=dict(**data, split='train'))
val_dataloader = dict(dataset=dict(**data, split='test'))
test_dataloader = val_dataloader
