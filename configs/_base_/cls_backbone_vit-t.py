# ViT-Ti/16, as ViT-B/16. MMPretrain has no file of its own for it: init_cfg.checkpoint has to name
# one, e.g. timm's vit_tiny_patch16_224 with MMPretrain's keys.
_base_ = './cls_backbone_vit-b.py'

model = dict(
    backbone=dict(
        arch='deit-t',
        init_cfg=dict(
            _delete_=True, type='Pretrained', checkpoint='weights/vit_tiny_p16_mmpretrain.pth')),
    head=dict(in_channels=192))
