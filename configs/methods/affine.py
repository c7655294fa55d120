# SSF (arXiv 2210.08823): a scale and a shift for each channel at the end of each residual branch;
# its authors have one behind every layer.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='branches',
    prompt=dict(type='mmprotune.AffinePrompt'))
