# Conv-Adapter's block (arXiv 2208.07463) behind the spatial convolution of each residual branch; its
# authors put it beside that convolution.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='narrow',
    prompt=dict(type='mmprotune.ConvAdapterPrompt'))
