# Flowers-102, training and validation split together.
_base_ = './cls_data.py'

num_classes = 102
data = dict(type='Flowers102', data_root='data/flowers102')
train_dataloader = dict(dataset=dict(**data, split='trainval'))
val_dataloader = dict(dataset=dict(**data, split='test'))
test_dataloader = val_dataloader
