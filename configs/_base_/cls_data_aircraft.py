# FGVC-Aircraft: 100 variants.
_base_ = './cls_data.py'

num_classes = 100
data = dict(type='FGVCAircraft', data_root='data/fgvc-aircraft-2013b')
train_dataloader = dict(dataset=dict(**data, split='trainval'))
val_dataloader = dict(dataset=dict(**data, split='test'))
test_dataloader = val_dataloader
