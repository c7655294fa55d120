# UperNet, ResNet-50, CamVid, Pro-tuning: frozen backbone, prompts and heads train.
_base_ = ['./upernet_r50_full_camvid.py', './_base_/protune.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmprotune.PromptedBackbone',
        backbone={{_base_.model.backbone}},
        insert='auto',
        # As wide as the bottlenecks' narrow maps, a ninth of the backbone (docs/results/methods.md);
        # kept are their inputs alone, which is less than a quarter of the width keeps otherwise.
        prompt=dict(type='mmprotune.PromptBlock', reduction=1),
        lean=dict(prompts='input')))
