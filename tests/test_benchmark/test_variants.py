"""What the config of a variant says, how it trains, and what an ablation takes out."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import init_default_scope

from mmprotune.benchmark.variants import Variant, variant_cfg, without
from mmprotune.engine import cli
from mmprotune.lean import onednn
from tests.test_tools.conftest import REPO

CONFIG = str(REPO / 'configs/mask_rcnn_r18_protune_shapes.py')


def test_compiled_variants():
    cfg = cli.load_config(CONFIG)
    own = {name: variant_cfg(cfg, name, dict(backend='eager')).model.backbone['compile']
           for name in ('naive', 'lean', 'frozen', 'compiled', 'budget')}
    assert own == dict(naive=False, lean=False, frozen=False, compiled=dict(backend='eager'),
                       budget=dict(backend='eager', activation_memory_budget=0.5))


@pytest.mark.parametrize('amp', [None, 'bfloat16'])
def test_whole_models_train_under_autocast(amp):
    config = str(REPO / 'configs/resnet18_protune_cifar10.py')
    args = SimpleNamespace(size=64, batch_size=1, device='cpu', amp=amp, data=False,
                           channels_last=False, backbone_only=False)
    cfg = cli.load_config(config)
    cfg.model.data_preprocessor = cfg.data_preprocessor
    init_default_scope('mmpretrain')
    variant = Variant(variant_cfg(cfg, 'lean'), 'lean', args)
    seen = []
    variant.model.backbone.backbone.conv1.register_forward_hook(
        lambda conv, args, y: seen.append(y.dtype))
    variant.loss()
    assert seen == [torch.bfloat16 if amp else torch.float32]


def test_a_part_is_out_while_the_context_is_open(monkeypatch):
    monkeypatch.setattr(onednn, 'product', lambda *_: 'product')
    with without('product'):
        assert onednn.product(None, None) is None
    with without('nothing'):
        assert onednn.product(None, None) == 'product'
    assert onednn.product(None, None) == 'product'
