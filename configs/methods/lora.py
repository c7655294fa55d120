# LoRA (arXiv 2106.09685) as mmpretrain has it, at the linear layers of attention. It wraps any
# backbone whose attention has layers named like these; a backbone without is refused. What a config
# says of the backbone's rate is for weights that were trained before.
backbone = dict(
    type='mmpretrain.LoRAModel',
    rank=16,
    alpha=16,
    targets=[dict(type=r'.*qkv'), dict(type=r'.*\.proj')])
inner = 'module'
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone.module': dict(lr_mult=1.)}))
