# UperNet, Swin-T, ADE20K, full fine-tuning: the stock recipe.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'

# For eight processes with two images each.
auto_scale_lr = dict(enable=False, base_batch_size=16)
