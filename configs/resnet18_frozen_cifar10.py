# ResNet-18: the frozen backbone without prompts, the classifier trains.
_base_ = './resnet18_protune_cifar10.py'

model = dict(backbone=dict(prompt=None))
# Of the sweep in docs/results/classification.md: ten times the rate of full fine-tuning.
optim_wrapper = dict(optimizer=dict(lr=1e-2))
