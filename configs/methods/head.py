# Head only: the frozen backbone without prompts.
backbone = dict(type='mmprotune.PromptedBackbone', prompt=None)
