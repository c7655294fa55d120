# Prompts on the outputs of the backbone alone; the frozen network never sees them.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='outputs',
    prompt=dict(type='mmprotune.PromptBlock'))
