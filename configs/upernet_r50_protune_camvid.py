# UperNet, ResNet-50, CamVid, Pro-tuning: frozen backbone, prompts and heads train.
_base_ = ['./upernet_r50_full_camvid.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))
