# ViT-Ti/16: the frozen backbone without prompts, the classifier trains.
_base_ = './vit-t_protune_cifar10.py'

model = dict(backbone=dict(prompt=None))
# Of the sweep in docs/results/classification.md, where 3e-2 was a little better.
optim_wrapper = dict(optimizer=dict(lr=1e-2))
