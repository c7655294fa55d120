# Mona's block (arXiv 2408.08345) behind each residual addition.
backbone = dict(
    type='mmprotune.PromptedBackbone', insert='blocks', prompt=dict(type='mmprotune.MonaPrompt'))
