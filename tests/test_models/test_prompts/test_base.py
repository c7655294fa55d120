"""A block of one's own is one class."""
import pytest
import torch
from torch import nn

from mmprotune.lean.prompts import _has_halves
from mmprotune.models.prompts import BasePrompt, PromptBlock
from mmprotune.registry import MODELS
from tests.conftest import RESNET18, build


@MODELS.register_module(force=True)
class ToyCut(BasePrompt):

    def __init__(self, channels, hidden=2, init_cfg=None):
        super().__init__(init_cfg)
        self.first, self.second = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def down(self, x):
        return self.first(x)

    def up(self, hidden):
        return self.second(hidden.relu())


@MODELS.register_module(force=True)
class ToyWhole(BasePrompt):

    def __init__(self, channels, zero_init=True, init_cfg=None):
        super().__init__(init_cfg)
        self.gain = nn.Parameter(torch.full((channels, 1, 1), 0. if zero_init else 0.5))

    def forward(self, x):
        return self.gain * x


def test_blocks_of_ones_own():
    x = torch.randn(1, 3, 64, 64)
    for name, last_stage in (('ToyCut', 'residual'), ('ToyWhole', 'residual'),
                             ('ToyWhole', 'serial')):
        model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
                           prompt=dict(type=f'mmprotune.{name}'), last_stage=last_stage)).eval()
        with torch.no_grad():
            with model.without_prompts():
                plain = model(x)
            first = model(x)
            assert torch.equal(first[0], plain[0])
            expected = plain[3] * (0.5 if last_stage == 'serial' else 1)
            torch.testing.assert_close(first[3], expected)
            for parameter in model.prompts.parameters():
                parameter.normal_()
            assert not torch.equal(model(x)[0], plain[0])


@pytest.mark.parametrize('name', ['PromptBlock', 'MonaPrompt', 'ConvAdapterPrompt',
                                  'AdaptFormerPrompt', 'LinearAdapterPrompt'])
def test_every_block_of_the_package_may_stand_alone(name):
    """Then it does not start at zero, unless somebody says so."""
    cfg = dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
               prompt=dict(type=f'mmprotune.{name}'), last_stage='serial')
    model = build(cfg)
    assert [block.zero_init for block in model.prompts.values()] == [True, True, True, False]
    last = model(torch.randn(1, 3, 64, 64))[3]
    assert last.std() > 1e-4
    last.square().sum().backward()
    assert all(p.grad.any() for n, p in model.prompts['stage4'].named_parameters()
               if 'bias' not in n)
    cfg['prompt']['zero_init'] = True
    with pytest.raises(ValueError, match="last_stage='serial' .* would kill the features"):
        build(cfg)


def test_a_block_of_one_piece_is_known_by_its_forward():
    assert not _has_halves(ToyWhole(4)) and _has_halves(ToyCut(4)) and _has_halves(PromptBlock(4))
    with pytest.raises(NotImplementedError, match='BasePrompt defines neither forward nor up'):
        BasePrompt().up(None)
