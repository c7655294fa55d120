# ViT-Ti/16: the frozen backbone with prompts, which train with the classifier.
_base_ = ['./vit-t_full_cifar10.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))
# Of the sweep in docs/results/classification.md: prompts, and the head alone, want ten times the rate of
# full fine-tuning.
optim_wrapper = dict(optimizer=dict(lr=1e-2))
