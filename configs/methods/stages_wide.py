# Prompts at stage ends, as wide as the feature.
backbone = dict(
    type='mmprotune.PromptedBackbone', insert='stages',
    prompt=dict(type='mmprotune.PromptBlock', reduction=1))
