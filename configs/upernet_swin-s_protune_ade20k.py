# UperNet, Swin-S, ADE20K, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmseg::swin/swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))

# For eight processes with two images each.
auto_scale_lr = dict(enable=False, base_batch_size=16)
