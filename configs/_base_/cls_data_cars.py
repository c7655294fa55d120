# Stanford Cars: 196 models.
_base_ = './cls_data.py'

num_classes = 196
data = dict(type='StanfordCars', data_root='data/stanford_cars')
train_dataloader = dict(dataset=dict(**data, split='train'))
val_dataloader = dict(dataset=dict(**data, split='test'))
test_dataloader = val_dataloader
