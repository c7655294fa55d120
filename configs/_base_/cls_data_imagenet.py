# ImageNet-1k.
_base_ = './cls_data.py'

num_classes = 1000
data = dict(type='ImageNet', data_root='data/imagenet')
train_dataloader = dict(dataset=dict(**data, split='train'))
val_dataloader = dict(dataset=dict(**data, split='val'))
test_dataloader = val_dataloader

# For tools/test_robustness.py --scenario ood. Folders are named by index or by WordNet id.
shifts = {
    name: dict(
        dataset=dict(type='CustomDataset', data_root=f'data/{folder}'), class_map=class_map)
    for name, folder, class_map in (
        ('imagenet_v2', 'imagenetv2-matched-frequency-format-val', 'indices'),
        ('imagenet_a', 'imagenet-a', 'wordnet'),
        ('imagenet_r', 'imagenet-r', 'wordnet'),
        ('imagenet_sketch', 'sketch', 'wordnet'))
}
