# Mask R-CNN, small ResNet-18-FPN, the drawn shapes of tools/quickstart.py, Pro-tuning.
_base_ = ['./_base_/mask_rcnn_r18_shapes.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        prompt=dict(type='mmprotune.PromptBlock'),
        # The backbone has seen no such grounds: prompts begin where images come in.
        insert='narrow',
        stem=True,
        freeze='pretrained'))
# Of the head's rate.
optim_wrapper = dict(paramwise_cfg=dict(prompts=dict(lr_mult=7)))
