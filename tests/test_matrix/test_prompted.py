"""A broken promise is seen."""
import torch

from mmprotune.matrix import prompted
from mmprotune.matrix.prompted import head_rate, wrong_rates
from mmprotune.models import PromptedBackbone
from tests.test_matrix.conftest import SMALL, check


def test_init_weights_that_moves_a_frozen_tensor_fails(monkeypatch):
    draw = PromptedBackbone.init_weights

    def init_weights(self):
        draw(self)
        next(self.backbone.parameters()).data.zero_()

    # Once before the snapshot is taken, by the constructor, that would do no harm.
    monkeypatch.setattr(PromptedBackbone, 'init_weights', init_weights)
    result = check(SMALL)
    assert result['verdict'] == 'fail'
    assert result['reason'].startswith('init_weights() moved 1 of')
    assert 'backbone.backbone.stem.conv.conv.weight' in result['reason']


def test_a_step_that_moves_a_frozen_tensor_fails(monkeypatch):
    forward = PromptedBackbone.forward

    def moving(self, *args):
        next(self.backbone.parameters()).data.add_(1)
        return forward(self, *args)

    monkeypatch.setattr(PromptedBackbone, 'forward', moving)
    result = check(SMALL)
    assert result['verdict'] == 'fail' and result['reason'].startswith('the step moved 1 of')


def test_frozen_modules_in_training_mode_fail(monkeypatch):
    monkeypatch.setattr(PromptedBackbone, 'train', torch.nn.Module.train)
    result = check(SMALL)
    assert result['verdict'] == 'fail' and 'in training mode' in result['reason']


def test_prompts_at_a_tenth_of_the_rate_fail(monkeypatch):
    wrap = prompted.protune

    def protune(cfg, **options):
        cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={'prompts': dict(lr_mult=0.1)})
        return wrap(cfg, **options)

    monkeypatch.setattr(prompted, 'protune', protune)
    result = check(SMALL)
    assert result['verdict'] == 'fail'
    assert result['reason'].startswith('the rate of 24 of 24 prompt parameters is not the head')
    assert 'trains at 0.001' in result['reason']


def test_prompts_outside_the_optimizer_fail():
    prompts = dict(inside=torch.nn.Parameter(torch.zeros(1)), out=torch.nn.Parameter(torch.ones(1)))
    fault, = wrong_rates(torch.optim.SGD([prompts['inside']], lr=0.1), prompts)
    assert fault == ("the rate of 1 of 2 prompt parameters is not the head's rate 0.1: "
                     'out is not in the optimizer')
    del prompts['out']
    assert wrong_rates(torch.optim.SGD(prompts.values(), lr=0.1), prompts) == []


def test_biases_may_have_the_rate_that_a_config_gives_all_of_them():
    bias, weight = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([dict(params=[bias], lr=0.2), dict(params=[weight])], lr=0.1)
    assert wrong_rates(optimizer, {'reduce.bias': bias, 'reduce.weight': weight}, 2.) == []
    fault, = wrong_rates(optimizer, {'reduce.weight': bias, 'reduce.bias': weight}, 2.)
    assert fault.endswith('reduce.weight trains at 0.2')


def test_the_rate_of_the_head_is_the_one():
    model = torch.nn.ModuleDict(dict(decode_head=torch.nn.Linear(3, 3), neck=torch.nn.Linear(9, 9)))
    groups = [dict(params=[model.decode_head.weight], lr=1.), dict(params=[model.decode_head.bias]),
              dict(params=model.neck.parameters())]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert head_rate(optimizer, model) == 1.
    prompts = {'reduce.weight': model.neck.weight}
    fault, = wrong_rates(optimizer, prompts, 1., 1.)
    assert fault.endswith("is not the head's rate 1: reduce.weight trains at 0.1")
    del model['decode_head']
    assert head_rate(optimizer, model) is None


def test_prompts_without_gradients_fail(monkeypatch):
    monkeypatch.setattr(PromptedBackbone, 'apply_prompt', lambda self, stage, x, *args: x)
    result = check(SMALL)
    assert result['verdict'] == 'fail'
    assert result['reason'].startswith('no gradient for 24 of 24 prompt parameters')


def test_places():
    # A Darknet has more residual branches than stages.
    found = {insert: check(SMALL, insert) for insert in (None, 'stages', 'narrow')}
    assert {insert: result['verdict'] for insert, result in found.items()} == {
        None: 'pass', 'stages': 'pass', 'narrow': 'pass'}
    assert found[None]['prompts'] == found['stages']['prompts'] == 4 < found['narrow']['prompts']
