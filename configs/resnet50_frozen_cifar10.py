# ResNet-50: the frozen backbone without prompts, the classifier trains.
_base_ = './resnet50_protune_cifar10.py'

model = dict(backbone=dict(prompt=None))
