# UperNet, ConvNeXt-B, ADE20K, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmseg::convnext/convnext-base_upernet_8xb2-amp-160k_ade20k-512x512.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))

# The stock recipe lets the learning rate fall with the depth of the layer. Here the backbone is
# frozen, and prompts at every depth start from the same zero. It does not decay biases and norms.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.))

# For eight processes with two images each.
auto_scale_lr = dict(enable=False, base_batch_size=16)
