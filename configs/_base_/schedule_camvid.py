# A comparison that takes minutes on a CPU core: 230 steps of batch 4 are five epochs of every second
# frame of CamVid's training part (184 images).
_base_ = 'mmseg::_base_/schedules/schedule_20k.py'

max_iters = 230
# AdamW for the reasons in schedule_160k_adamw.py, in larger steps, as there are few.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=20, end=max_iters, by_epoch=False),
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(logger=dict(interval=5), checkpoint=dict(interval=max_iters))
