# UperNet, ResNet-50, CamVid, full fine-tuning: a comparison that takes minutes on a CPU core.
_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    './_base_/camvid.py',
    './_base_/schedule_camvid.py',
    'mmseg::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(240, 320)),
    pretrained=None,
    # The ResNet that most pre-trained files are of, not v1c. Its BatchNorm statistics stand still:
    # four crops are too few to estimate them from.
    backbone=dict(
        type='ResNet',
        norm_cfg=dict(type='BN'),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
    # A quarter of the stock width: a tenth of the operations, and eleven classes need no more.
    decode_head=dict(channels=128, num_classes=11),
    auxiliary_head=dict(channels=64, num_classes=11))

# For the batch of 4.
auto_scale_lr = dict(enable=False, base_batch_size=4)
