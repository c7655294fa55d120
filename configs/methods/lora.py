# LoRA (arXiv 2106.09685) as mmpretrain has it, at the linear layers of attention. It wraps any
# backbone whose attention has layers named like these; a backbone without is refused.
backbone = dict(
    type='mmpretrain.LoRAModel',
    rank=16,
    alpha=16,
    targets=[dict(type=r'.*qkv'), dict(type=r'.*\.proj')])
inner = 'module'
