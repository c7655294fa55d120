# UperNet, BEiT-B, ADE20K, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py', './_base_/protune.py']

model = dict(
    # Of the pre-trained file.
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        # The stock config names a file that has to be made first. MMPretrain publishes one, fine-tuned
        # on ImageNet-1k as well, for its own class of the same network.
        backbone=dict(
            type='mmpretrain.BEiTViT',
            arch='base',
            img_size=(640, 640),
            patch_size=16,
            out_indices=(3, 5, 7, 11),
            out_type='featmap',
            init_cfg=dict(
                type='Pretrained',
                checkpoint='https://download.openmmlab.com/mmclassification/v0/beit/beit-base_3rdparty_in1k_20221114-c0a4df23.pth',
                prefix='backbone.')),
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))

# The stock recipe lets the learning rate fall with the depth of the layer. Here the backbone is
# frozen, and prompts at every depth start from the same zero. It does not decay biases and norms.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-5, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0., flat_decay_mult=0.))

# For eight processes with two images each.
auto_scale_lr = dict(enable=False, base_batch_size=16)
