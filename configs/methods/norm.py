# The backbone's norm layers train, the rest of it is frozen.
backbone = dict(type='mmprotune.PromptedBackbone', prompt=None)
trains = 'norms'
