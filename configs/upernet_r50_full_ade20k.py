# UperNet, ResNet-50 (v1c), ADE20K, full fine-tuning: what the other two are compared with.
# The parts of mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py, the optimizer excepted.
_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    './_base_/schedule_160k_adamw.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))
