# ViT-B/16. Prompts are computed on the grid of patch tokens and added to them; the class token gets
# none. The classifier reads the mean of the patch tokens, so that the last prompt reaches it. With
# out_type='cls_token' it reads the class token, which attends to prompted patches in every layer, but
# not behind the last one, whose prompt it could not see: PromptedBackbone then takes
# last_stage='none'.
_base_ = './cls_backbone_r50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        arch='b',
        img_size=224,
        patch_size=16,
        out_type='avg_featmap',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/vit/finetune/vit-base-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-98e8652b.pth',
            prefix='backbone.')),
    neck=None,
    head=dict(in_channels=768))
data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
