# ViT-B/16. Prompts are computed on the grid of patch tokens and added to them; the class token gets
# none. MMPROTUNE_VIT_READS says what the classifier reads:
#   patches  the mean of the patch tokens, so that the last prompt reaches it (the default);
#   token    the class token. It attends to prompted patches in every layer but after the last one,
#            whose prompt it could not see: the last stage goes without.
_base_ = './cls_backbone_r50.py'

reads = '{{$MMPROTUNE_VIT_READS:patches}}'
model = dict(
    backbone=dict(
        _delete_=True,
        type='VisionTransformer',
        arch='b',
        img_size={{'$MMPROTUNE_SIZE:224'}},
        patch_size=16,
        out_type=dict(patches='avg_featmap', token='cls_token')[reads],
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/vit/finetune/vit-base-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-98e8652b.pth',
            prefix='backbone.')),
    neck=None,
    head=dict(in_channels=768))
mean = [127.5, 127.5, 127.5]
std = [127.5, 127.5, 127.5]
last_stage = dict(patches='residual', token='none')[reads]
