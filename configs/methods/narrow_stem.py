# Prompts inside every residual branch and behind the stem, at three times the head's rate.
backbone = dict(
    type='mmprotune.PromptedBackbone', insert='narrow', stem=True,
    prompt=dict(type='mmprotune.PromptBlock'))
optim_wrapper = dict(paramwise_cfg=dict(prompts=dict(lr_mult=3)))
