# Pro-tuning as its paper draws it: a prompt at the end of each stage.
backbone = dict(
    type='mmprotune.PromptedBackbone', insert='stages', prompt=dict(type='mmprotune.PromptBlock'))
