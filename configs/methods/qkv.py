# Prompts at queries, keys and values and behind the MLP of each block of mmpretrain's ViTs. timm's
# have the former at 'timm_model.blocks.*.attn.qkv'.
backbone = dict(
    type='mmprotune.PromptedBackbone',
    stages=['layers.*.attn.qkv', 'layers.*.ffn.layers'],
    prompt=dict(type='mmprotune.PromptBlock', reduction=16))
