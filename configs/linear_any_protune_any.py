# Pro-tuning with a linear classifier: frozen backbone, prompts and classifier train.
_base_ = ['./linear_any_full_any.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        last_stage={{_base_.last_stage}},
        prompt=dict(type='mmprotune.PromptBlock')))
# Of the sweep in docs/results/classification.md: prompts, and the head alone, want ten times the rate of
# full fine-tuning.
optim_wrapper = dict(optimizer=dict(lr=1e-2))
work_dir = 'work_dirs/linear_{{$MMPROTUNE_BACKBONE:r50}}_protune_{{$MMPROTUNE_DATA:cifar10}}'
