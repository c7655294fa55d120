# The stock 160k-iteration schedule with another optimizer; prompted, head-only and full fine-tuning
# share it, so that they can be compared.
_base_ = 'mmseg::_base_/schedules/schedule_160k.py'

# Instead of SGD with 0.01: freshly added prompts sit at every depth of the network, and their
# gradients differ in scale by stage; AdamW takes steps of equal size for all of them. The values are
# those of mmseg's own AdamW recipes for UperNet with a hierarchical backbone.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=160000, by_epoch=False),
]
# Four processes with four images each, or eight with two.
auto_scale_lr = dict(enable=False, base_batch_size=16)
