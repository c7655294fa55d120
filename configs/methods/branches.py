# A prompt at the end of each residual branch, before the addition.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='branches',
    prompt=dict(type='mmprotune.PromptBlock'))
