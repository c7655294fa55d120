# DINO (four scales), ResNet-50, COCO, 12 epochs, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        prompt=dict(type='mmprotune.PromptBlock')))

# The stock recipe trains the backbone at a tenth of the rate; prompts train at the head's.
optim_wrapper = dict(constructor='mmprotune.PromptOptimWrapperConstructor')
