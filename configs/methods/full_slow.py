# Full fine-tuning, the backbone at a tenth of the optimizer's learning rate.
backbone = None
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
