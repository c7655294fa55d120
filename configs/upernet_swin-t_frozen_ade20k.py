# UperNet, Swin-T, ADE20K, head only: the frozen backbone without prompts.
_base_ = './upernet_swin-t_protune_ade20k.py'

model = dict(backbone=dict(prompt=None))
