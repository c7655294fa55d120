# UperNet, ViT-Tiny/16, CamVid, head only: the frozen backbone without prompts.
_base_ = './upernet_vit-t_protune_camvid.py'

model = dict(backbone=dict(prompt=None))
