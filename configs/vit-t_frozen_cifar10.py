# ViT-Ti/16: the frozen backbone without prompts, the classifier trains.
_base_ = './vit-t_protune_cifar10.py'

model = dict(backbone=dict(prompt=None))
