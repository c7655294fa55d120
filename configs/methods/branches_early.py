# Prompts inside every residual branch; stem and first stage train, too, at a tenth of the rate.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    insert='branches',
    prompt=dict(type='mmprotune.PromptBlock'))
trains = 'first_stage'
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone.backbone': dict(lr_mult=0.1)}))
