# Prompts inside every residual branch, as wide as the branch.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='branches',
    prompt=dict(type='mmprotune.PromptBlock', reduction=1))
