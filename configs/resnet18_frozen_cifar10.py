# ResNet-18: the frozen backbone without prompts, the classifier trains.
_base_ = './resnet18_protune_cifar10.py'

model = dict(backbone=dict(prompt=None))
