# UperNet, ResNet-50 (v1c), ADE20K, head only: the frozen backbone without prompts.
_base_ = './upernet_r50_protune_ade20k.py'

model = dict(backbone=dict(prompt=None))
