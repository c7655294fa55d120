import copy

import pytest
import torch
from torch import nn

from mmprotune.errors import DoesNotFit
from mmprotune.freezing import adopt, freeze, keep_frozen_in_eval


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


def test_shared_modules_are_frozen_under_every_name():
    """Blocks of a ViT may share their rotary embedding; the state dict has it once for each."""
    norm = torch.nn.BatchNorm1d(3)
    net = torch.nn.ModuleDict(dict(a=torch.nn.Sequential(torch.nn.Linear(3, 3), norm),
                                   b=torch.nn.Sequential(torch.nn.Linear(3, 3), norm)))
    assert freeze(net) == set(net.state_dict())
    found = freeze(net, trainable=[r'a\.1\.weight'])
    assert net['b'][1].weight.requires_grad and not found & {'a.1.weight', 'b.1.weight'}


def test_adopted_tensors_stay_in_their_memory():
    """Shared layers stay shared; what one module does to its parameters stays its own."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 1)
    donor = nn.ModuleDict(dict(a=conv, b=conv, norm=nn.BatchNorm2d(3)))
    taker = copy.deepcopy(donor)
    tensors = dict(donor.state_dict(keep_vars=True))
    adopt(taker, {name: tensor.detach() for name, tensor in tensors.items()})
    assert taker.a is taker.b and taker.a.weight is taker.b.weight
    assert all(tensor.data_ptr() == tensors[name].data_ptr()
               for name, tensor in taker.state_dict().items())
    assert not taker.a.weight.requires_grad and donor.a.weight.requires_grad
    taker.a.weight.data = torch.zeros(3, 3, 1, 1)
    assert donor.a.weight.any()
    before = {name: tensor.data_ptr() for name, tensor in taker.state_dict().items()}
    for wrong in (torch.zeros(4), torch.zeros(3, 3)):
        with pytest.raises(DoesNotFit, match=r'has \(3,\) for norm.bias, expected'):
            adopt(taker, {'norm.weight': torch.zeros(3), 'norm.bias': wrong})
    with pytest.raises(DoesNotFit, match='nothing of that name for norm.gain'):
        adopt(taker, {'norm.gain': torch.zeros(3)})
    assert before == {name: tensor.data_ptr() for name, tensor in taker.state_dict().items()}
