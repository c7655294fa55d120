# UperNet, ResNet-50 (v1c), ADE20K, Pro-tuning: frozen backbone, prompts and heads train.
_base_ = ['./upernet_r50_full_ade20k.py', './_base_/protune.py']

# The segmentor would hand `pretrained` on to the outer backbone only; it belongs to the inner one.
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        pretrained={{_base_.model.pretrained}},
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))
