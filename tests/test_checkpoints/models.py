"""Small prompted classifiers, and files of them."""
import torch
from mmengine.config import Config

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from tests.classification import classifier_cfg
from tests.conftest import RESNET18, wake

CLASSES = ('a', 'b', 'c', 'd')


def prompted_config(file, classes=CLASSES, **options) -> Config:
    """A prompted classifier's whole config; its data are never read."""
    backbone = {'type': 'mmprotune.PromptedBackbone',
                'backbone': dict(RESNET18, init_cfg=dict(type='Pretrained', checkpoint=str(file))),
                'lean': False, **options}
    dataset = dict(type='CustomDataset', data_root='nowhere', metainfo=dict(classes=classes))
    return Config(dict(
        default_scope='mmpretrain', model=classifier_cfg(backbone),
        test_dataloader=dict(dataset=dataset),
        train_dataloader=dict(dataset=dict(
            type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[dataset]))))
    )


def trained_model(cfg):
    model = build_model(cfg)
    wake(model, seed=3)
    return model


def save_model(model, path, **meta):
    state_dict = model if isinstance(model, dict) else model.state_dict()
    torch.save(dict(meta=meta, state_dict=state_dict), path)
    return str(path)


def same_weights(a, b):
    a, b = checkpoint.full_state_dict(a), checkpoint.full_state_dict(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) for k in a if not k.endswith('frozen_fingerprint'))
