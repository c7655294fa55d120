# ResNet-50: the frozen backbone with prompts, which train with the classifier.
_base_ = ['./resnet50_full_cifar10.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))
# Of the sweeps in docs/results/methods.md: the best of 1e-3, 3e-3 and 1e-2 for prompts at these places.
optim_wrapper = dict(optimizer=dict(lr=3e-3))
