# UperNet, ResNet-50, CamVid, head only: the frozen backbone without prompts.
_base_ = './upernet_r50_protune_camvid.py'

model = dict(backbone=dict(prompt=None))
