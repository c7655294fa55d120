# ViT-Ti/16: the frozen backbone without prompts, the classifier trains.
_base_ = './vit-t_protune_cifar10.py'

model = dict(backbone=dict(prompt=None))
# As the other two; in the sweep in docs/results/classification.md 3e-2 was better (47.8 to 43.0).
optim_wrapper = dict(optimizer=dict(lr=1e-2))
