# AdaptFormer's block (arXiv 2205.13535) at the end of each residual branch; its authors put it
# beside the MLP of each transformer block.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='branches',
    prompt=dict(type='mmprotune.AdaptFormerPrompt'))
