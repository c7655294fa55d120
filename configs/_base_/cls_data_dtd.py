# Describable Textures, first of its ten splits, training and validation together.
_base_ = './cls_data.py'

num_classes = 47
data = dict(type='DTD', data_root='data/dtd')
train_dataloader = dict(dataset=dict(**data, split='trainval'))
val_dataloader = dict(dataset=dict(**data, split='test'))
test_dataloader = val_dataloader
