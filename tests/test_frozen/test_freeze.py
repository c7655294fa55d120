import pytest
import torch
from torch import nn

from mmprotune import FrozenSnapshot, audit
from mmprotune.errors import FrozenTensorsChanged
from mmprotune.frozen import FillRecorder, digest_tensors, fingerprint, freeze, keep_frozen_in_eval
from tests.conftest import build


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(), nn.BatchNorm2d(4)),
        nn.Dropout())


def test_freeze_names_parameters_and_buffers():
    net = network()
    frozen = freeze(net)
    assert frozen == set(net.state_dict())
    assert not any(p.requires_grad for p in net.parameters())


def test_buffers_of_what_trains_are_not_frozen():
    net = network()
    frozen = freeze(net, trainable=[r'2\.1\..*'])
    assert frozen == {k for k in net.state_dict() if not k.startswith('2.1.')}
    keep_frozen_in_eval(net.train())
    modes = {n: m.training for n, m in net.named_modules()}
    # Dropout inside the trained part drops; the frozen rest, the outer dropout included, does not.
    assert modes == {'': False, '0': False, '1': False, '2': True, '2.0': True, '2.1': True,
                     '3': False}


def test_a_layer_that_prepares_for_eval_mode_does_so():

    class Prepared(nn.Linear):

        def train(self, mode=True):
            super().train(mode)
            self.table = None if mode else self.weight.detach() * 2  # and returns nothing

    for net in (nn.Sequential(Prepared(2, 2)), nn.Sequential(Prepared(2, 2), nn.Linear(2, 2))):
        freeze(net, trainable=[r'1\..*'] if len(net) > 1 else [])
        net[0].train(True)
        keep_frozen_in_eval(net)
        assert not net[0].training
        assert torch.equal(net[0].table, net[0].weight * 2)


def test_keep_and_trainable_add_up():
    net = network()
    freeze(net, keep=['0.bias'], trainable=[r'1\.weight'])
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ['0.bias', '1.weight']


def test_a_pattern_matches_whole_names_only():
    with pytest.raises(ValueError, match="trainable: 'weight' matches no parameter.*0.weight"):
        freeze(network(), trainable=['weight'])


def test_freeze_again_follows_the_new_rule():
    net = network()
    freeze(net)
    freeze(net, trainable=['.*'])
    assert all(p.requires_grad for p in net.parameters())


def test_fill_recorder_sees_what_fits():
    original = nn.Module._load_from_state_dict
    state = network().state_dict()
    del state['0.bias']
    state['1.weight'] = torch.zeros(9)
    state['fc.weight'] = torch.zeros(1)

    class Built(nn.Module):
        """Loads in its constructor, as timm's models do."""

        def __init__(self):
            super().__init__()
            self.net = network()
            with pytest.raises(RuntimeError, match='size mismatch'):
                self.net.load_state_dict(state, strict=False)

    with FillRecorder() as recorder:
        built = Built()
    assert nn.Module._load_from_state_dict is original
    assert recorder.filled(built) == {
        f'net.{k}' for k in network().state_dict()} - {'net.0.bias', 'net.1.weight'}
    assert recorder.file_shapes == {k: tuple(v.shape) for k, v in state.items()}
    assert not recorder.filled(network())


def test_digest_depends_on_every_part():
    x = torch.arange(4.)
    one = digest_tensors(dict(a=x))['a']
    assert digest_tensors(dict(a=x.clone()))['a'] == one
    others = [dict(b=x), dict(a=x.double()), dict(a=x.view(2, 2)), dict(a=x + 1e-6)]
    assert len({one, *(next(iter(digest_tensors(o).values())) for o in others)}) == 5


def test_fingerprint_ignores_order_layout_and_knows_every_dtype():
    tensors = dict(
        a=torch.randn(3, 4, 5, 5), b=torch.arange(3), c=torch.ones(2, dtype=torch.bfloat16),
        d=torch.tensor(True), e=torch.zeros(0))
    print_ = fingerprint(tensors)
    assert print_.shape == (32, ) and print_.dtype == torch.uint8
    assert torch.equal(print_, fingerprint(dict(reversed(tensors.items()))))
    moved = dict(tensors, a=tensors['a'].to(memory_format=torch.channels_last))
    assert torch.equal(print_, fingerprint(moved))
    assert not torch.equal(print_, fingerprint(dict(tensors, d=torch.tensor(False))))


# --- audit: each way to break the promise is caught ------------------------------------------


def test_audit_passes_a_model_in_order(prompted_cfg):
    model = build(prompted_cfg).train()
    audit(model, FrozenSnapshot(model), training=True)


def _nudge(tensor):
    with torch.no_grad():
        tensor.view(-1)[0] += 1


@pytest.mark.parametrize('breaks, match', [
    (lambda m: _nudge(m.backbone.layer3[0].conv1.weight),
     r'frozen tensors moved: backbone\.layer3\.0\.conv1\.weight$'),
    (lambda m: _nudge(m.backbone.bn1.running_mean), r'moved: backbone\.bn1\.running_mean$'),
    (lambda m: m.backbone.conv1.weight.requires_grad_(True),
     r'backbone\.conv1\.weight is declared frozen, but its requires_grad is True'),
    (lambda m: setattr(m.backbone.conv1.weight, 'grad', torch.zeros(8, 3, 7, 7)),
     'conv1.weight is declared frozen, but has a gradient'),
    (lambda m: m.backbone.layer1[0].bn1.train(),
     r'backbone\.layer1\.0\.bn1 \(BatchNorm2d\) is frozen, but in training mode'),
    (lambda m: m.eval(), 'in eval mode, expected training'),
])
def test_audit_names_what_moved(prompted_cfg, breaks, match):
    model = build(prompted_cfg).train()
    snapshot = FrozenSnapshot(model)
    breaks(model)
    with pytest.raises(FrozenTensorsChanged, match=match):
        audit(model, snapshot, training=True)


def test_audit_lets_a_part_predict_that_does_not_train(prompted_cfg):
    """A mean teacher beside its student."""
    model = nn.ModuleDict(dict(student=build(prompted_cfg), teacher=build(prompted_cfg))).train()
    model['teacher'].requires_grad_(False).eval()
    audit(model, FrozenSnapshot(model), training=True)
    model['student'].eval()
    with pytest.raises(FrozenTensorsChanged, match='student is in eval mode, expected training'):
        audit(model, training=True)


def test_audit_finds_the_backbone_inside_a_model(prompted_cfg):
    detector = nn.Module()
    detector.backbone = build(prompted_cfg)
    snapshot = FrozenSnapshot(detector)
    _nudge(detector.backbone.backbone.conv1.weight)
    assert snapshot.moved(detector) == ['backbone.backbone.conv1.weight']


def test_audit_needs_a_prompted_backbone():
    with pytest.raises(ValueError, match='got Sequential without one'):
        audit(network())


def test_shared_modules_are_frozen_under_every_name():
    """Blocks of a ViT may share their rotary embedding; the state dict has it once for each."""
    norm = torch.nn.BatchNorm1d(3)
    net = torch.nn.ModuleDict(dict(a=torch.nn.Sequential(torch.nn.Linear(3, 3), norm),
                                   b=torch.nn.Sequential(torch.nn.Linear(3, 3), norm)))
    assert freeze(net) == set(net.state_dict())
    found = freeze(net, trainable=[r'a\.1\.weight'])
    assert net['b'][1].weight.requires_grad and not found & {'a.1.weight', 'b.1.weight'}
