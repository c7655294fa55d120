# The backbone's last stage trains (the last quarter of a plain stack of blocks), and what follows it.
backbone = dict(type='mmprotune.PromptedBackbone', prompt=None)
trains = 'last_stage'
