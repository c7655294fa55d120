# DeepLabV3+, ResNet-50 (v1c, output stride 8), ADE20K, Pro-tuning: frozen backbone, prompts and head train.
# The parts of mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py, but AdamW and its
# schedule, for the reason given there.
_base_ = [
    'mmseg::_base_/models/deeplabv3plus_r50-d8.py',
    'mmseg::_base_/datasets/ade20k.py',
    './_base_/schedule_160k_adamw.py',
    'mmseg::_base_/default_runtime.py',
    './_base_/protune.py',
]

# The segmentor would hand `pretrained` on to the outer backbone only; it belongs to the inner one.
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        pretrained={{_base_.model.pretrained}},
        insert='auto',
        prompt=dict(type='mmprotune.PromptBlock')),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))
