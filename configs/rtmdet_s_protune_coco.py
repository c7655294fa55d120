# RTMDet-s, COCO, Pro-tuning: frozen backbone, prompts and head train.
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        prompt=dict(type='mmprotune.PromptBlock')))

# The stock config has hooks of its own (EMA, the switch of the pipeline), which stay; so these are
# written out instead of inheriting _base_/protune.py.
custom_hooks = _base_.custom_hooks + [
    dict(type='mmprotune.PromptCheckpointHook'),
    dict(type='mmprotune.FreezeGuardHook'),
    dict(type='mmprotune.PromptStatsHook'),
]
# Its rate is for eight processes with 32 images each; the stock config says 16.
auto_scale_lr = dict(base_batch_size=256)
