# A prompt at the end of each block.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='blocks',
    prompt=dict(type='mmprotune.PromptBlock'))
