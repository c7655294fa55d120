"""What the config of a variant says, and what an ablation takes out."""
from mmprotune.benchmark.variants import variant_cfg, without
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


def test_a_part_is_out_while_the_context_is_open(monkeypatch):
    monkeypatch.setattr(onednn, 'product', lambda *_: 'product')
    with without('product'):
        assert onednn.product(None, None) is None
    with without('nothing'):
        assert onednn.product(None, None) == 'product'
    assert onednn.product(None, None) == 'product'
