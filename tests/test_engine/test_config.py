"""Stock configs as they are wrapped, and the rates of what trains in them."""
from __future__ import annotations

import copy

import pytest
from mmdet.models import FasterRCNN, ResNet
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import PretrainedInit
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from torch import nn

from mmprotune import FreezeGuardHook, PromptedBackbone, protune
from mmprotune.config_nodes import type_name
from mmprotune.engine import config as engine_config
from mmprotune.engine import optim
from mmprotune.engine.config import CONSTRUCTOR, HOOKS, set_prompt_rates
from mmprotune.engine.runner import build_runner
from mmprotune.errors import LaunchError
from tests.classification import classifier_cfg
from tests.conftest import RESNET18, build


def test_a_stock_config_is_wrapped():
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    stock = cfg.model.backbone.to_dict()
    protune(cfg)
    assert cfg.model.backbone.type == 'mmprotune.PromptedBackbone'
    assert cfg.model.backbone.backbone.to_dict() == stock
    assert [h.type for h in cfg.custom_hooks] == list(HOOKS)
    before = cfg.copy()
    protune(cfg)  # again: nothing more to do
    assert cfg.to_dict() == before.to_dict()


@pytest.mark.parametrize(('name', 'insert'), [
    ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', None),
    ('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py', 'auto'),
    ('mmpretrain::resnet/resnet18_8xb16_cifar10.py', 'auto')])
def test_places_by_library(name, insert):
    cfg = get_config(name)
    assert protune(copy.deepcopy(cfg)).model.backbone.get('insert') == insert
    assert protune(copy.deepcopy(cfg), insert='blocks').model.backbone.insert == 'blocks'
    # It is for prompts at stage ends.
    assert 'insert' not in protune(cfg, last_stage='serial').model.backbone


def test_a_segmentors_pretrained_moves_to_the_backbone():
    cfg = protune(get_config('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'))
    assert 'pretrained' not in cfg.model
    assert cfg.model.backbone.backbone.init_cfg == dict(
        type='Pretrained', checkpoint='open-mmlab://resnet50_v1c')


def test_hooks_of_the_config_stay():
    cfg = Config(dict(model=dict(backbone=dict(type='ResNet')), custom_hooks=[dict(type='A')]))
    assert [h.type for h in protune(cfg, freeze='all').custom_hooks] == ['A', *HOOKS]
    assert cfg.model.backbone['freeze'] == 'all'


def test_a_backbone_further_inside():
    cfg = get_config(
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py')
    stock = cfg.model.detector.backbone.to_dict()
    protune(cfg)
    assert cfg.model.detector.backbone.type == 'mmprotune.PromptedBackbone'
    assert cfg.model.detector.backbone.backbone.to_dict() == stock
    assert [h.type for h in cfg.custom_hooks] == ['MeanTeacherHook', *HOOKS]

    cfg = protune(Config(dict(model=dict(models=[dict(backbone=dict(type='ResNet'))]))))
    assert cfg.model.models[0].backbone.type == 'mmprotune.PromptedBackbone'


def test_one_of_several_backbones():
    name = 'mmdet::deepsort/deepsort_faster-rcnn_r50_fpn_8xb2-4e_mot17train_test-mot17test.py'
    with pytest.raises(LaunchError, match=r'2 backbones: model\.detector\.backbone, '
                       r'model\.reid\.backbone\. Wrap the one .*mmprotune\.PromptedBackbone'):
        protune(get_config(name))
    cfg = get_config(name)
    cfg.model.reid.backbone = dict(
        type='mmprotune.PromptedBackbone', backbone=cfg.model.reid.backbone)
    protune(cfg)  # as the message says
    assert cfg.model.detector.backbone.type == 'ResNet'
    assert [h.type for h in cfg.custom_hooks][-3:] == list(HOOKS)


def test_the_file_of_a_whole_model():
    """Its backbone is what training would go on from."""
    cfg = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    assert 'frozen_from' not in protune(copy.deepcopy(cfg)).model.backbone
    cfg.load_from = 'detector.pth'
    assert protune(copy.deepcopy(cfg)).model.backbone.frozen_from == 'detector.pth'
    own = protune(copy.deepcopy(cfg), frozen_from='mine.pth')
    assert own.model.backbone.frozen_from == 'mine.pth'
    assert cfg.load_from == 'detector.pth'  # neck and head come from there too
    cfg.resume = True  # a checkpoint of this very run
    assert 'frozen_from' not in protune(cfg).model.backbone


@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit])
@pytest.mark.parametrize('path', ['model', 'model.detector'])
def test_the_file_of_what_holds_the_backbone(kind, path):
    backbone = dict(type='ResNet', init_cfg=dict(type='Pretrained', checkpoint='backbone.pth'))
    cfg = Config(dict(model=dict(detector=dict(backbone=backbone), neck=dict(
        init_cfg=dict(type='Pretrained', checkpoint='neck.pth')))))
    cfg.merge_from_dict({f'{path}.init_cfg': dict(type=kind, checkpoint='whole.pth')})
    wrapper = protune(cfg).model.detector.backbone
    assert wrapper.frozen_from == 'whole.pth'
    assert wrapper.backbone.to_dict() == backbone


def test_types_that_are_classes(resnet18_file):
    """As MMEngine's configs in pure Python have them."""
    init_cfg = dict(type=PretrainedInit, checkpoint=resnet18_file)
    cfg = Config(dict(
        model=dict(type=FasterRCNN, backbone=dict(RESNET18, type=ResNet, init_cfg=init_cfg)),
        custom_hooks=[dict(type=FreezeGuardHook)]))
    protune(cfg)
    assert [type_name(h) for h in cfg.custom_hooks] == [
        'FreezeGuardHook', 'PromptCheckpointHook', 'PromptStatsHook']
    assert build(cfg.model.backbone).frozen_names
    cfg.model.backbone['type'] = PromptedBackbone
    before = cfg.to_dict()
    assert protune(cfg).to_dict() == before


@pytest.mark.parametrize('content', [dict(), dict(model=dict(type='X')), dict(model=None)])
def test_no_backbone(content):
    with pytest.raises(LaunchError, match='expected a config with model.backbone'):
        protune(Config(content))


# --- rates -------------------------------------------------------------------------------------


WRAPPER = dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
               prompt=dict(type='mmprotune.PromptBlock', norm_cfg=dict(type='BN')))


def config(custom_keys: dict | None = None, model: dict | None = None, weight_decay=0.1,
           **optim_wrapper) -> Config:
    optimizer = dict(type='AdamW', lr=0.01)
    if weight_decay is not None:
        optimizer['weight_decay'] = weight_decay
    if custom_keys is not None:
        optim_wrapper['paramwise_cfg'] = dict(
            optim_wrapper.get('paramwise_cfg', {}), custom_keys=custom_keys)
    return Config(dict(
        model=copy.deepcopy(model or dict(type='A', backbone=WRAPPER)),
        optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer, **optim_wrapper)))


def nested(path: str = '', trainable=()) -> nn.Module:
    """A model with a wrapper at ``path`` + 'backbone' and a head beside it."""
    model = nn.Module()
    model.backbone = build(dict(WRAPPER, trainable=trainable))
    model.head = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for name in reversed([part for part in path.split('.') if part]):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    return model


def rates(cfg: Config, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter that the optimizer got."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    return {names[id(p)]: (group['lr'], group['weight_decay'])
            for group in optimizer.param_groups for p in group['params']}


def of_prompts(found: dict) -> set:
    return {rate for name, rate in found.items() if '.prompts.' in f'.{name}'}


def of_heads(found: dict) -> set:
    return {rate for name, rate in found.items() if '.head.' in f'.{name}'}


# --- custom keys ------------------------------------------------------------------------------


@pytest.mark.parametrize('lr_mult', [0.1, 0.0])
def test_a_multiplier_for_the_backbone_is_not_for_prompts(lr_mult):
    cfg = config({'backbone': dict(lr_mult=lr_mult, decay_mult=0.5)})
    sentence, = set_prompt_rates(cfg)
    assert "constructor='mmprotune.PromptOptimWrapperConstructor' is set" in sentence
    found = rates(cfg, nested(trainable=('layer4.*', )))
    assert of_prompts(found) == of_heads(found) == {(0.01, 0.1)}
    # What trains of the backbone itself keeps the config's rate.
    assert found['backbone.backbone.layer4.0.conv1.weight'] == (0.01 * lr_mult, 0.05)
    assert set_prompt_rates(cfg) == []  # again: nothing more to do


def test_without_a_weight_decay():
    cfg = config({'backbone': dict(lr_mult=0.1)}, weight_decay=None)
    set_prompt_rates(cfg)
    assert {lr for lr, _ in of_prompts(rates(cfg, nested()))} == {0.01}


@pytest.mark.parametrize('keys', [
    {'norm': dict(decay_mult=0.)}, {'neck': dict(lr_mult=0.1)},
    {'.backbone.classifier': dict(lr_mult=10)}, None])
def test_rates_stay_where_nothing_is_inherited(keys):
    cfg = config(keys, paramwise_cfg=dict(norm_decay_mult=0., bias_lr_mult=2.))
    before, model = rates(cfg, nested()), nested()
    set_prompt_rates(cfg)
    assert rates(cfg, model) == before
    assert ('constructor' in cfg.optim_wrapper) == (keys is not None)


def test_models_without_prompts_are_left_alone():
    keys = {'backbone': dict(lr_mult=0.1)}
    for backbone in (RESNET18, dict(WRAPPER, prompt=None)):
        cfg = config(keys, dict(type='A', backbone=backbone))
        assert set_prompt_rates(cfg) == []
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys == keys
    assert set_prompt_rates(Config(dict(model=dict(backbone=WRAPPER)))) == []  # no optimizer


@pytest.mark.parametrize(('key', 'stage1', 'others'), [
    ('prompts', 0.02, 0.02), ('backbone.prompts', 0.02, 0.02), ('prompts.stage1', 0.02, 0.01),
    ('prompt', 0.02, 0.02), ('backbone.prompt', 0.02, 0.02),
    ('backbone.prompts.stage1', 0.02, 0.01)])
def test_the_users_key_for_prompts_counts(key, stage1, others):
    """Also where MMEngine would prefer the longer name of the backbone."""
    cfg = config({'backbone': dict(lr_mult=0.1), key: dict(lr_mult=2.)})
    set_prompt_rates(cfg)
    found = {name: lr for name, (lr, _) in rates(cfg, nested()).items()}
    assert {lr for name, lr in found.items() if '.prompts.stage1.' in name} == {stage1}
    assert {lr for name, lr in found.items() if '.prompts.stage2.' in name} == {others}


@pytest.mark.parametrize(('key', 'lr'), [
    ('backbone', 0.01), ('detector.backbone', 0.01),
    ('detector', 0.001)])  # the detector's head has that rate too
def test_rates_of_a_backbone_further_inside(key, lr):
    cfg = config({key: dict(lr_mult=0.1)},
                 dict(type='A', detector=dict(type='B', backbone=WRAPPER)))
    set_prompt_rates(cfg)
    found = rates(cfg, nested('detector'))
    assert of_prompts(found) == of_heads(found) == {(lr, 0.1)}


def test_rates_of_a_backbone_of_another_name():
    cfg = config({'backbone': dict(lr_mult=0.1)}, dict(type='A', img_backbone=WRAPPER))
    set_prompt_rates(cfg)
    model = nested()
    model.img_backbone = model.backbone
    del model.backbone
    found = rates(cfg, model)
    assert of_prompts(found) == of_heads(found) == {(0.01, 0.1)}


def test_a_rate_around_the_backbone_is_the_heads():
    cfg = config({'detector': dict(lr_mult=0.5), 'detector.backbone': dict(lr_mult=0.1)},
                 dict(type='A', detector=dict(type='B', backbone=WRAPPER)))
    set_prompt_rates(cfg)
    found = rates(cfg, nested('detector'))
    assert of_prompts(found) == of_heads(found) == {(0.005, 0.1)}


@pytest.mark.parametrize('key', ['backbone', 'student.backbone'])
def test_a_semi_supervised_detector(key):
    cfg = config({key: dict(lr_mult=0.1)}, dict(
        type='SoftTeacher', semi_train_cfg=dict(), detector=dict(type='B', backbone=WRAPPER)))
    set_prompt_rates(cfg)
    found = rates(cfg, nested('student'))
    assert of_prompts(found) == of_heads(found) == {(0.01, 0.1)}


def test_several_optimizers_and_mixed_precision():
    inner = dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=1.),
                 paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))
    cfg = Config(dict(
        model=dict(type='A', backbone=WRAPPER),
        optim_wrapper=dict(constructor='Own', first=inner, second=copy.deepcopy(inner))))
    assert len(set_prompt_rates(cfg)) == 2
    for name in ('first', 'second'):
        assert cfg.optim_wrapper[name].constructor == CONSTRUCTOR
    assert cfg.optim_wrapper.constructor == 'Own'


@pytest.mark.parametrize('name', [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', 'mmdet::detr/detr_r50_8xb2-150e_coco.py',
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
    'mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py'])
def test_stock_configs(name):
    cfg = protune(get_config(name))
    found = rates(cfg, nested())
    assert {lr for lr, _ in of_prompts(found)} == {lr for lr, _ in of_heads(found)}
    assert {lr for lr, _ in of_prompts(found)} == {cfg.optim_wrapper.optimizer.lr}


def test_the_runner_of_a_config_in_three_lines(tmp_path):
    """One that names the wrapper itself, without ``protune``."""
    cfg = config({'backbone': dict(lr_mult=0.1)})
    cfg.update(model=classifier_cfg(), work_dir=str(tmp_path), launcher='none',
               experiment_name=tmp_path.name, train_dataloader=dict(dataset=dict()),
               train_cfg=dict(by_epoch=True, max_epochs=1))
    build_runner(cfg)
    assert cfg.optim_wrapper.constructor == CONSTRUCTOR
    assert f"constructor='{CONSTRUCTOR}' is set" in next(tmp_path.glob('*/*.log')).read_text()


# --- layer-wise rates -------------------------------------------------------------------------


@pytest.mark.parametrize('name', [
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py'])
def test_rates_that_fall_with_the_depth(name):
    cfg = protune(get_config(name))
    assert 'constructor' not in cfg.optim_wrapper
    cfg.optim_wrapper.type = 'OptimWrapper'  # some train in mixed precision, on a GPU
    cfg.optim_wrapper.pop('loss_scale', None)
    optimizer = cfg.optim_wrapper.optimizer
    for parameter, (lr, decay) in rates(cfg, model := nested()).items():
        assert lr == optimizer.lr
        flat = parameter.endswith('.bias') or model.get_parameter(parameter).ndim == 1
        assert decay == (0 if flat else optimizer.weight_decay), parameter


def test_rates_that_fell_with_the_depth_of_a_model_that_shares_layers():
    """As RTMDet's head does, which the layer-wise constructors take once."""
    cfg = protune(get_config('mmdet::rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco.py'))
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    model = nested()
    model.same = model.head
    found = rates(cfg, model)
    assert found['head.0.weight'] == (cfg.optim_wrapper.optimizer.lr, 0.05)


def test_the_classifiers_constructor_keeps_its_decay():
    cfg = config(
        {'.cls_token': dict(decay_mult=0.), 'head.0': dict(decay_mult=0.5, lr_mult=7.)},
        constructor='LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.65, norm_decay_mult=0.))
    sentence, _ = set_prompt_rates(cfg)
    assert "'LearningRateDecayOptimWrapperConstructor' is replaced by the default one" in sentence
    assert cfg.optim_wrapper.paramwise_cfg == dict(
        norm_decay_mult=0.,
        custom_keys={'.cls_token': dict(decay_mult=0.), 'head.0': dict(decay_mult=0.5)},
        bypass_duplicate=True)
    found = rates(cfg, nested())
    # That constructor takes no rate from custom keys either.
    assert found['head.0.weight'] == (0.01, 0.05)
    assert found['head.1.weight'] == (0.01, 0.)
    assert found['backbone.prompts.stage1.reduce.weight'] == (0.01, 0.05)  # as the head's


def test_other_constructors_stay():

    class Own(DefaultOptimWrapperConstructor):
        pass

    for constructor in (Own, 'Own', 'ForceDefaultOptimWrapperConstructor'):
        cfg = config(constructor=constructor)
        assert set_prompt_rates(cfg) == []
        assert cfg.optim_wrapper.constructor == constructor


# --- a rate of their own ----------------------------------------------------------------------


@pytest.mark.parametrize('name', [
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmseg::setr/setr_vit-l_mla_8xb1-80k_cityscapes-768x768.py'])
def test_a_heads_own_rate_is_the_prompts_too(name):
    cfg = protune(get_config(name))
    found = rates(cfg, nested())
    assert {lr for lr, _ in of_prompts(found)} == {lr for lr, _ in of_heads(found)} == {
        10 * cfg.optim_wrapper.optimizer.lr}


@pytest.mark.parametrize('exempt', [
    dict(norm_decay_mult=0., bias_decay_mult=0.),
    dict(custom_keys={'norm': dict(decay_mult=0.), '.bias': dict(decay_mult=0.)})])
def test_norms_and_biases_stay_exempt(exempt):
    """Whatever else custom keys say of the backbone, and at a rate of their own."""
    keys = {'backbone': dict(lr_mult=0.1, decay_mult=0.5), **exempt.pop('custom_keys', {})}
    cfg = config(keys, paramwise_cfg=dict(prompts=dict(lr_mult=3., decay_mult=0.5), **exempt))
    set_prompt_rates(cfg)
    found = {n: rate for n, rate in rates(cfg, nested()).items() if '.prompts.' in n}
    flat = {rate for n, rate in found.items() if n.endswith('.bias') or '.norm.' in n}
    assert flat == {(0.03, 0.)}
    assert set(found.values()) - flat == {(0.03, 0.05)}


def test_the_default_is_one_constant(monkeypatch):
    monkeypatch.setitem(optim.PROMPT_MULTIPLIERS, 'lr_mult', 3.)
    for keys in (None, {'backbone': dict(lr_mult=0.1)}):
        cfg = config(keys)
        set_prompt_rates(cfg)
        found = rates(cfg, nested())
        assert of_prompts(found) == {(0.03, 0.1)} and of_heads(found) == {(0.01, 0.1)}
    cfg = config({'head': dict(lr_mult=10.)})
    set_prompt_rates(cfg)
    assert of_prompts(rates(cfg, nested())) == {(0.3, 0.1)}
    cfg = config({'backbone.prompts': dict(lr_mult=2.)})  # a key of the user's own is the rate
    set_prompt_rates(cfg)
    assert of_prompts(rates(cfg, nested())) == {(0.02, 0.1)}


@pytest.mark.parametrize('key', ['prompts', 'custom_keys.prompts'])
def test_a_rate_of_the_command_line(key):
    """It comes after ``--protune`` has set all that the stock config asks for."""
    cfg = protune(get_config('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'))
    cfg.merge_from_dict({f'optim_wrapper.paramwise_cfg.{key}.lr_mult': 3})
    assert set_prompt_rates(cfg) == []
    assert of_prompts(rates(cfg, nested())) == {(3 * cfg.optim_wrapper.optimizer.lr, 1e-4)}


@pytest.mark.parametrize('name', [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py'])
def test_a_rate_given_from_python(name):
    """Also where a constructor that decays rates with the depth makes way."""
    cfg = protune(get_config(name), prompt_rates=dict(lr_mult=3., decay_mult=0.5))
    optimizer = cfg.optim_wrapper.optimizer
    found = rates(cfg, nested())
    assert found['head.0.weight'] == (optimizer.lr, optimizer.weight_decay)
    assert found['backbone.prompts.stage1.reduce.weight'] == (
        3 * optimizer.lr, 0.5 * optimizer.weight_decay)
    assert 'prompt_rates' not in cfg.model.backbone


@pytest.mark.parametrize(('prompts', 'message'), [
    (3., 'must be a dict with the keys lr_mult and decay_mult, got 3.0'),
    (dict(lr=3.), r"keys lr_mult and decay_mult, got \{'lr': 3.0\}"),
    (dict(lr_mult=-1), 'prompts.lr_mult must be a number that is not negative, got -1'),
    (dict(decay_mult='0.5'), "prompts.decay_mult must be a number that is not negative, got '0.5'"),
    (dict(decay_mult=2.), 'prompts.decay_mult multiplies optim_wrapper.optimizer.weight_decay')])
def test_what_is_no_rate(prompts, message):
    cfg = config(paramwise_cfg=dict(prompts=prompts), weight_decay=None)
    set_prompt_rates(cfg)
    with pytest.raises(LaunchError, match=message):
        rates(cfg, nested())


def test_a_rate_beside_another_constructor_is_refused():
    with pytest.raises(LaunchError, match='optim_wrapper.paramwise_cfg.prompts=.* is for '
                       f"optim_wrapper.constructor='{CONSTRUCTOR}', got 'Own'"):
        set_prompt_rates(config(constructor='Own', paramwise_cfg=dict(prompts=dict(lr_mult=2.))))
    sentence, = set_prompt_rates(config({'backbone': dict(lr_mult=0.1)}, constructor='Own'))
    assert "constructor='Own' is kept: it decides about the rate of prompts" in sentence


@pytest.mark.parametrize(('constructor', 'warned'), [
    (None, False), (CONSTRUCTOR, False), ('mmdet.Own', True)])
def test_constructors_of_others_are_warned_of(monkeypatch, constructor, warned):
    said = []
    monkeypatch.setattr(engine_config, 'print_log', lambda text, **kwargs: said.append(text))
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.optim_wrapper.update(
        paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
        **({} if constructor is None else dict(constructor=constructor)))
    protune(cfg)
    assert any('tell layers apart' in text for text in said) == warned
