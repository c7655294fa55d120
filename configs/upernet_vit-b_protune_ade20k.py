# UperNet, ViT-B/16, ADE20K, Pro-tuning: frozen backbone, prompts and head train.
_base_ = ['mmseg::vit/vit_vit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py', './_base_/protune.py']

model = dict(
    # Of the pre-trained file.
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        # The stock config names a file that has to be made first. MMPretrain publishes one, for its
        # own class; as in MMSegmentation's, no norm follows the last layer.
        backbone=dict(
            type='mmpretrain.VisionTransformer',
            arch='b',
            img_size=(512, 512),
            patch_size=16,
            out_indices=(2, 5, 8, 11),
            out_type='featmap',
            final_norm=False,
            init_cfg=dict(
                type='Pretrained',
                checkpoint='https://download.openmmlab.com/mmclassification/v0/vit/finetune/vit-base-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-98e8652b.pth',
                prefix='backbone.')),
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')))

# For eight processes with two images each.
auto_scale_lr = dict(enable=False, base_batch_size=16)
