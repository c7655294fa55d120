# A prompt where each residual branch is narrow: behind the 3x3 convolution of a bottleneck.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='narrow',
    prompt=dict(type='mmprotune.PromptBlock'))
