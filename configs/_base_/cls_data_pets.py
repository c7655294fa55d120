# Oxford-IIIT Pets: 37 breeds.
_base_ = './cls_data.py'

num_classes = 37
data = dict(type='OxfordIIITPet', data_root='data/pets')
train_dataloader = dict(dataset=dict(**data, split='trainval'))
val_dataloader = dict(dataset=dict(**data, split='test'))
test_dataloader = val_dataloader
