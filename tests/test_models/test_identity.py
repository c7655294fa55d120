"""A checkpoint belongs to what its network computes, not to its weights alone."""
import copy
import logging

import pytest
import torch
from mmengine.registry import MODELS as ROOT_MODELS

from mmprotune.checkpoint import full_state_dict
from mmprotune.checkpoints import slim
from mmprotune.errors import FunctionMismatch, IncompleteCheckpoint
from mmprotune.models.identity import difference, pack, summary
from tests.conftest import RESNET18, build, wake
from tests.test_models.test_insertion import SWIN
from tests.test_models.test_layouts import HRNET, VIT

PROMPT = dict(type='mmprotune.PromptBlock')
# Else the residual branches of random networks return zeros.
BASIC = dict(RESNET18, zero_init_residual=False)
BOTTLENECKS = dict(BASIC, depth=50)
PROMPTS = 'the prompts in the checkpoint were trained to act in another way.*last_stage=.*stages='
BACKBONE = 'was trained with one that computes something else.*strides, dilations, style'


def prompted(backbone=RESNET18, **options):
    """Always with the same weights."""
    return build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, freeze='all',
                      **options)).eval()


CHANGES = [
    (RESNET18, dict(last_stage='residual'), dict(last_stage='serial'), PROMPTS),
    (RESNET18, dict(prompt=PROMPT), dict(prompt=dict(PROMPT, act_cfg=None)), PROMPTS),
    (RESNET18, dict(prompt=PROMPT), dict(prompt=dict(PROMPT, act_cfg=dict(type='ReLU'))), PROMPTS),
    (RESNET18, dict(stages=['layer1.0', 'layer2']), dict(stages=['layer1.1', 'layer2']), PROMPTS),
    (SWIN, dict(stages=['stages.0.blocks.0']), dict(stages=['stages.0.blocks.0.attn']), PROMPTS),
    (BOTTLENECKS, dict(style='pytorch'), dict(style='caffe'), BACKBONE),
    (BASIC, dict(strides=(1, 2, 2, 2)), dict(strides=(1, 2, 2, 1)), BACKBONE),
    (BASIC, dict(dilations=(1, 1, 1, 1)), dict(dilations=(1, 1, 1, 2)), BACKBONE),
    (VIT, dict(num_heads=2), dict(num_heads=4), BACKBONE),
    (VIT, dict(act_cfg=dict(type='GELU')), dict(act_cfg=dict(type='ReLU')), BACKBONE),
]


def two(backbone, first, second):
    """Models of two configs that differ in one setting, of the wrapper or of the backbone."""
    models = []
    for options in (first, second):
        own = {k: v for k, v in options.items() if k in ('last_stage', 'prompt', 'stages')}
        rest = {k: v for k, v in options.items() if k not in own}
        models.append(prompted(dict(backbone, **rest), **own))
    return models


@pytest.mark.parametrize('backbone, first, second, message', CHANGES)
def test_a_network_that_computes_something_else_is_refused(backbone, first, second, message):
    model, other = two(backbone, first, second)
    assert model.own_fingerprint == other.own_fingerprint  # or the weights would tell
    assert model.state_dict().keys() == other.state_dict().keys()
    before = copy.deepcopy(other.state_dict())
    for state_dict in (model.state_dict(), full_state_dict(model)):
        with pytest.raises(FunctionMismatch, match=message):
            other.load_state_dict(state_dict)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    twin = two(backbone, first, second)[0]
    for state_dict in (model.state_dict(), full_state_dict(model)):
        assert str(twin.load_state_dict(state_dict)) == '<All keys matched successfully>'


@pytest.mark.parametrize(('there', 'here', 'message'), [
    (dict(), dict(insert='narrow'),
     r"prompts at stage1, .*model, with insert='narrow', at branch1, .*; set insert='stages'$"),
    (dict(insert='branches', stem=True), dict(stem=True),
     r"prompts at branch1, .*insert='stages', at stage1, .*; set insert='branches' or 'narrow'$"),
    (dict(insert='outputs'), dict(insert='blocks'), r"at output0, .*; set insert='outputs'$"),
])
def test_prompts_of_other_places_are_refused(there, here, message):
    a, b = prompted(**there), prompted(**here)
    for state_dict in (a.state_dict(), full_state_dict(a)):
        with pytest.raises(IncompleteCheckpoint, match=message):
            b.load_state_dict(state_dict)
    # In a model the key is named from the top of the config.
    with pytest.raises(IncompleteCheckpoint, match=r'; set model\.backbone\.insert='):
        torch.nn.ModuleDict(dict(backbone=b)).load_state_dict(
            {f'backbone.{key}': tensor for key, tensor in a.state_dict().items()})


def test_prompts_of_another_width_are_refused_by_their_shapes():
    a, b = prompted(), prompted(prompt=dict(PROMPT, reduction=1))
    for state_dict in (a.state_dict(), full_state_dict(a)):
        with pytest.raises(IncompleteCheckpoint, match=(
                r'have other shapes: prompts\.stage1\..*: expected \(8,.*, got \(2,.*; set prompt '
                'to what they were trained with .reduction')):
            b.load_state_dict(state_dict)
    with pytest.raises(IncompleteCheckpoint, match=r'; set model\.backbone\.prompt to'):
        torch.nn.ModuleDict(dict(backbone=b)).load_state_dict(
            {f'backbone.{key}': tensor for key, tensor in a.state_dict().items()})


@pytest.mark.parametrize('same', [
    (dict(), dict(prompt=dict(PROMPT, act_cfg=dict(type='GELU'), reduction=4))),
    (dict(), dict(stages=['layer1', 'layer2', 'layer3', 'layer4'])),
    (dict(), dict(lean=False)), (dict(lean=False), dict(lean=dict(attention='sdpa'))),
    (dict(prompt=dict(PROMPT, zero_init=False)), dict()),  # how it starts is not what it computes
], ids=str)
def test_other_ways_to_write_the_same_are_the_same(same):
    a, b = (prompted(**options) for options in same)
    wake(a)
    assert str(b.load_state_dict(a.state_dict())) == '<All keys matched successfully>'


@pytest.mark.parametrize('convert', [
    lambda model: model.double(), lambda model: prompted(BASIC, backbone_dtype='bfloat16'),
    lambda model: model.bfloat16()])
def test_precision_moves_it_little(convert):
    model = prompted(BASIC)
    distances = difference(convert(copy.deepcopy(model)).function_of(), model.frozen_function)
    assert 0 < max(distances) < 0.03  # the tolerance for 16 bits


def test_training_and_other_start_values_do_not_change_it(resnet18_file):
    """Not those of what the file left unfilled either."""
    init_cfg = dict(type='Pretrained', checkpoint=resnet18_file)
    cfg = dict(type='mmprotune.PromptedBackbone', backbone=dict(RESNET18, init_cfg=init_cfg),
               trainable=[r'layer4\.1\..*'])
    model, other = build(cfg, seed=1), build(cfg, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    distances = difference(model.function_of(), other.frozen_function)
    assert distances == pytest.approx([0, 0], abs=1e-3)


def test_a_full_checkpoint_of_other_weights_carries_its_own(prompted_cfg, other_resnet18_file):
    model = build(prompted_cfg)
    prompted_cfg['backbone']['init_cfg']['checkpoint'] = other_resnet18_file
    other = build(prompted_cfg)
    assert not torch.equal(model.frozen_function, other.frozen_function)
    model.load_state_dict(full_state_dict(other))
    assert torch.equal(model.frozen_function, other.frozen_function)
    stock = build(prompted_cfg, seed=3).backbone.state_dict()
    again = build(dict(prompted_cfg, freeze='all'), seed=4)
    again.load_state_dict(stock)
    distances = difference(again.frozen_function, other.frozen_function)
    assert distances == pytest.approx([0, 0], abs=1e-3)


def test_files_of_the_older_form_load_with_a_warning(monkeypatch):
    model, other = prompted(), prompted(last_stage='serial')
    lines = []
    monkeypatch.setattr(slim, 'print_log',
                        lambda text, logger=None, level=logging.INFO: lines.append((level, text)))
    for state_dict in (model.state_dict(), full_state_dict(model)):
        del state_dict['frozen_function']
        assert str(other.load_state_dict(state_dict)) == '<All keys matched successfully>'
        distances = difference(other.frozen_function, other.function_of())
        assert distances == pytest.approx([0, 0], abs=1e-3)
    assert [level for level, _ in lines] == [logging.WARNING] * 2
    assert 'of an older version' in lines[0][1] and 'last_stage' in lines[0][1]


def test_a_backbone_that_runs_at_no_size_is_not_compared():
    model = prompted(prompt=None)
    assert model.frozen_function.any()
    model.frozen_function.zero_()
    other = prompted(prompt=None)
    other.load_state_dict(model.state_dict())


def test_summaries_move_with_their_outputs():
    torch.manual_seed(0)
    outputs = [torch.randn(2, 8, 16, 24), torch.randn(2, 16, 8, 12).relu()]
    start = summary(outputs)
    for share in (0.01, 0.1):
        moved = [y + share * y.square().mean().sqrt() * torch.randn_like(y) for y in outputs]
        distance, = difference(pack([start]), pack([summary(moved)]))
        assert share / 2 < distance < share * 4
    scaled = summary([outputs[0], 1.5 * outputs[1]])
    distance, = difference(pack([start]), pack([scaled]))
    assert distance == pytest.approx(0.2, abs=0.01)  # ln 1.5 / 2
    assert summary([]).shape == start.shape


@pytest.mark.parametrize('backbone, trainable, runs', [
    # One for the stages, one with prompts.
    (BASIC, r'layer4\..*', 2), (SWIN, r'norm3\..*', 2), (HRNET, r'stage4\..*', 2),
    (VIT, r'layers\.3\..*', 3),  # one more: what the last prompt of a class token acts on
])
def test_the_run_that_finds_the_stages_counts(backbone, trainable, runs, monkeypatch):
    cls, seen = type(ROOT_MODELS.build(dict(backbone))), []
    forward = cls.forward
    monkeypatch.setattr(cls, 'forward', lambda self, x: (seen.append(1), forward(self, x))[1])
    model = prompted(backbone, trainable=[trainable], lean=False)
    assert len(seen) == runs
    assert model.frozen_function.any()
    assert torch.equal(model.frozen_function, model.function_of())
    seen.clear()
    prompted(backbone, prompt=None, lean=False)
    assert len(seen) == 1


def test_files_of_a_version_that_took_another_image_load():
    cfg = dict(type='mmpretrain.VisionTransformer', img_size=48, patch_size=8, out_type='featmap',
               arch=dict(embed_dims=24, num_layers=3, num_heads=2, feedforward_channels=48))
    model, twin, other = (prompted(cfg, **options)
                          for options in (dict(), dict(), dict(prompt=dict(
                              type='mmprotune.PromptBlock', act_cfg=dict(type='ReLU')))))
    state_dict = model.state_dict()
    former = model.function_of(former=True)
    assert max(difference(former, model.frozen_function)) > 0.1
    state_dict['frozen_function'] = former
    twin.load_state_dict(state_dict)
    with pytest.raises(FunctionMismatch, match='prompts in the checkpoint'):
        other.load_state_dict(state_dict)
