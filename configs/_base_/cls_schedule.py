# One schedule for prompted, head-only and full fine-tuning, so that they can be compared, at the rate of
# full fine-tuning. The …_protune_….py have that of the others; a backbone may want another one
# (--cfg-options optim_wrapper.optimizer.lr=…): docs/results/classification.md has a sweep.
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.))
epochs = 20
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', T_max=epochs, end=epochs, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=epochs, val_interval=epochs)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=64)
