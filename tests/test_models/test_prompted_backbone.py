import copy
import logging
import pickle

import pytest
import torch
from mmdet.registry import MODELS as DET_MODELS
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import get_state_dict
from torch import nn

from mmprotune import FrozenSnapshot, PromptedBackbone, audit
from mmprotune.checkpoint import full_state_dict
from mmprotune.errors import FrozenTensorsChanged, PretrainedFileError
from mmprotune.lean.dry_run import tensors_in
from tests.classification import classification_scope, classifier_cfg
from tests.conftest import RESNET18, build, wake
from tests.test_models.test_insertion import SWIN


@ROOT_MODELS.register_module(force=True)
class ToyFixed(BaseModule):
    """A backbone with a random table that it keeps from training."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(8, 1, 1)) for _ in range(8))
        self.table = nn.Parameter(torch.rand(8, 1, 1), requires_grad=False)

    def forward(self, x):
        x = self.norm(self.conv(x)) + self.table
        for scale in self.scales:
            x = x * scale
        return (x, )


def plain(prompted):
    """The frozen backbone alone: the same weights, stock layers, no prompts."""
    return copy.deepcopy(prompted).unwrap()


def test_features_by_hand():
    """x̂_i = x_i + P_i(x_i), each stage fed with the prompted one before it."""
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all')).eval()
    wake(model)
    net, x = plain(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        feature = net.maxpool(net.relu(net.norm1(net.conv1(x))))
        for i, (out, name) in enumerate(zip(model(x), net.res_layers), start=1):
            feature = getattr(net, name)(feature)
            feature = feature + model.prompts[f'stage{i}'](feature)
            torch.testing.assert_close(out, feature)


def test_last_stage_forms():
    for last_stage, prompts in (('residual', 4), ('serial', 4), ('none', 3)):
        model = build(
            dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
                 last_stage=last_stage, lean=dict(rounds=False))).eval()
        assert len(model.prompts) == prompts
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            outs, plain_outs = model(x), plain(model)(x)
        assert all(torch.equal(a, b) for a, b in zip(outs[:3], plain_outs))
        if last_stage == 'serial':
            torch.testing.assert_close(outs[3], model.prompts['stage4'](plain_outs[3]))
            assert outs[3].abs().sum() > 0
        else:
            assert torch.equal(outs[3], plain_outs[3])


def test_no_graph_below_the_first_prompt(prompted_cfg):
    model = build(prompted_cfg)
    seen = {}
    for name in ('conv1', 'layer1.0', 'layer1.1', 'layer2.0'):
        model.backbone.get_submodule(name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: out.requires_grad}))
    # Registered after the prompt's own hook, so this one sees what leaves the stage.
    model.backbone.layer1.register_forward_hook(
        lambda _, args, out: seen.update(stage1=out.requires_grad))
    model(torch.randn(1, 3, 64, 64))
    assert seen == {
        'conv1': False, 'layer1.0': False, 'layer1.1': False, 'stage1': True, 'layer2.0': True}


def test_head_only_builds_no_graph_at_all(prompted_cfg):
    model = build(dict(prompted_cfg, prompt=None))
    assert not any(f.requires_grad for f in model(torch.randn(1, 3, 64, 64)))
    assert not model.prompts


def test_full_fine_tuning_is_a_config_too(prompted_cfg):
    backbone = dict(prompted_cfg['backbone'], norm_eval=False, frozen_stages=1)
    model = build(dict(prompted_cfg, backbone=backbone, prompt=None, trainable=['.*']))
    assert not model.frozen_names
    assert all(p.requires_grad for p in model.train().parameters())
    assert all(m.training for m in model.modules())


def test_drop_path_stands_still():
    model = build(
        dict(type='mmprotune.PromptedBackbone', backbone=dict(SWIN, drop_path_rate=0.5),
             freeze='all')).train()
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model(x), model(x)))


def test_norms_the_file_lacks_train_and_are_saved(tmp_path):
    torch.manual_seed(0)
    swin = DET_MODELS.build(dict(SWIN))
    file = tmp_path / 'swin.pth'
    torch.save({f'backbone.{k}': v for k, v in swin.state_dict().items()
                if not k.startswith('norm')}, file)
    model = build(
        dict(type='mmprotune.PromptedBackbone',
             backbone=dict(SWIN, init_cfg=dict(type='Pretrained', checkpoint=str(file)))))
    trains = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trains == {f'norm{i}.{p}' for i in range(4) for p in ('weight', 'bias')}
    assert {f'backbone.{n}' for n in trains} <= set(model.state_dict())
    for name, value in swin.state_dict().items():
        if not name.startswith('norm'):
            assert torch.equal(model.backbone.state_dict()[name], value)


# --- pre-trained files -----------------------------------------------------------------------


def test_weights_are_there_after_construction(prompted_cfg, resnet18_file):
    model = build(prompted_cfg)
    for name, value in torch.load(resnet18_file).items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    fingerprint = model.frozen_fingerprint.clone()
    frozen = {n: t.clone() for n, t in model.frozen_tensors().items()}
    prompt = model.prompts['stage1'].reduce.weight.clone()
    model.init_weights()  # as Runner.train does: prompts only
    assert not torch.equal(model.prompts['stage1'].reduce.weight, prompt)
    assert all(torch.equal(t, frozen[n]) for n, t in model.frozen_tensors().items())
    assert torch.equal(model.frozen_fingerprint, fingerprint)


@pytest.mark.parametrize('how', ['pretrained', 'init_cfg'])
def test_a_file_given_to_the_wrapper_goes_to_the_backbone(resnet18_file, how):
    value = resnet18_file if how == 'pretrained' else dict(
        type='Pretrained', checkpoint=resnet18_file)
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, **{how: value}))
    assert torch.equal(model.backbone.conv1.weight, torch.load(resnet18_file)['conv1.weight'])


def test_no_file():
    match = "freeze='pretrained' needs.*init_cfg.*frozen_from.*freeze='all'"
    with pytest.raises(PretrainedFileError, match=match):
        build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18))


def test_a_backbone_that_forbids_an_init_cfg(tmp_path):
    """frozen_from also takes a file of the backbone alone."""
    cfg = dict(type='mmdet.HourglassNet', downsample_times=2, num_stacks=1, feat_channel=8,
               stage_channels=(8, 8, 8), stage_blocks=(1, 1, 1))
    weights = {k: v + 1 for k, v in DET_MODELS.build(dict(cfg)).state_dict().items()}
    torch.save(weights, tmp_path / 'hourglass.pth')
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=cfg,
                       frozen_from=str(tmp_path / 'hourglass.pth')))
    assert model.frozen_names == set(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.backbone.state_dict().items())


def test_a_file_that_fills_nothing(prompted_cfg, tmp_path):
    file = str(tmp_path / 'vgg.pth')
    torch.save({'features.0.weight': torch.zeros(1)}, file)
    prompted_cfg['backbone']['init_cfg']['checkpoint'] = file
    with pytest.raises(PretrainedFileError,
                       match=r"fills 0 of 60 parameters of ResNet, expected at least 90%.*"
                       r"\['features.0.weight'\].*\['conv1.weight'"):
        build(prompted_cfg)


def test_a_prefix_that_would_fit_is_named(prompted_cfg, resnet18_file, tmp_path):
    file = str(tmp_path / 'detector.pth')
    weights = torch.load(resnet18_file)
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in weights.items()}), file)
    init_cfg = prompted_cfg['backbone']['init_cfg']
    init_cfg['checkpoint'] = file
    with pytest.raises(PretrainedFileError, match="init_cfg.prefix='backbone.' would fit"):
        build(prompted_cfg)
    init_cfg['prefix'] = 'backbone.'
    assert torch.equal(build(prompted_cfg).backbone.conv1.weight, weights['conv1.weight'])


def test_a_file_that_does_not_exist(prompted_cfg):
    prompted_cfg['backbone']['init_cfg']['checkpoint'] = 'no/such.pth'
    model = build(prompted_cfg)  # a full checkpoint may follow
    message = 'no/such.pth cannot be had .*no/such.pth can not be found.*no full checkpoint' \
        '.*init_cfg.checkpoint'
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(PretrainedFileError, match=message):
        model(x)
    with pytest.raises(PretrainedFileError, match=message):
        model.init_weights()  # as a Runner does before it trains


def test_a_full_checkpoint_stands_in_for_a_file_that_does_not_exist(prompted_cfg):
    trained, slim = build(prompted_cfg).eval(), build(prompted_cfg).state_dict()
    wake(trained)
    lost = copy.deepcopy(prompted_cfg)
    lost['backbone']['init_cfg']['checkpoint'] = 'no/such.pth'
    model = build(lost, seed=7).eval()
    with pytest.raises(PretrainedFileError, match='no/such.pth cannot be had'):
        model.load_state_dict(slim)
    assert str(model.load_state_dict(full_state_dict(trained))) == \
        '<All keys matched successfully>'
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(model(x), trained(x)):
            torch.testing.assert_close(found, expected)
    audit(model)


# --- initialisation by the model around it -----------------------------------------------------

INIT_CFG = [dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02),
            dict(type='Constant', layer=['_BatchNorm', 'LayerNorm'], val=1., bias=0.)]


def classifier(backbone: dict, init_cfg=INIT_CFG):
    with classification_scope():
        return build(dict(classifier_cfg(backbone), init_cfg=init_cfg))


@pytest.mark.parametrize('lean', [True, False])
def test_an_init_cfg_of_the_model_leaves_what_is_frozen(prompted_cfg, lean):
    model = classifier(dict(prompted_cfg, lean=lean))
    before = FrozenSnapshot(model)
    head = model.head.fc.weight.clone()
    wake(model)
    model.init_weights()
    assert before.moved(model) == []
    audit(model)
    assert not torch.equal(model.head.fc.weight, head)  # it did something
    assert not model.backbone.prompts.stage1.expand.weight.any()  # and prompts start at zero


def test_what_the_file_did_not_fill_is_still_initialised(tmp_path, resnet18_file):
    weights = {k: v for k, v in torch.load(resnet18_file).items() if 'layer4.1.bn2' not in k}
    torch.save(weights, tmp_path / 'file.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
    backbone = dict(
        type='mmprotune.PromptedBackbone', backbone=dict(RESNET18, init_cfg=init_cfg))
    model = classifier(backbone, [
        dict(type='Constant', layer='_BatchNorm', val=3.)])
    model.init_weights()
    assert model.backbone.backbone.layer4[1].bn2.weight.eq(3).all()
    assert not model.backbone.backbone.layer4[0].bn2.weight.eq(3).any()


def test_the_audit_sees_what_moved_before_it_looked(prompted_cfg):
    model = build(prompted_cfg)
    audit(model)
    with torch.no_grad():
        model.backbone.layer2[0].conv1.weight[0, 0, 0, 0] += 1
    for snapshot in (None, FrozenSnapshot(model)):
        with pytest.raises(FrozenTensorsChanged, match='not what they were.*expected finger'):
            audit(model, snapshot)
    model.refresh_fingerprint()
    audit(model)


def test_conversion_to_another_dtype_is_no_change(prompted_cfg):
    audit(build(prompted_cfg).bfloat16())


@pytest.mark.parametrize('trainable', [(), ('.*', )])
def test_what_the_backbone_keeps_from_training_does_not_train(trainable, tmp_path):
    """A sine-cosine table of positions, with a file that holds it and with one that does not."""
    cfg = dict(type='ToyFixed')
    for holds in (True, False):
        weights = ToyFixed().state_dict()
        if not holds:
            weights.pop('table')
        torch.save(weights, tmp_path / 'file.pth')
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'))
        model = build(dict(type='mmprotune.PromptedBackbone', prompt=None, trainable=trainable,
                           backbone=dict(cfg, init_cfg=init_cfg)))
        assert not model.backbone.table.requires_grad
        assert model.backbone.conv.weight.requires_grad == bool(trainable)
        # One that no file holds is random here, so that it has to be saved.
        assert ('backbone.table' in model.state_dict()) is not holds
    with pytest.raises(ValueError, match="'table' matches only parameters that the"):
        build(dict(type='mmprotune.PromptedBackbone', trainable=['table'], freeze='all',
                   backbone=cfg))


def test_data_parallel_is_refused(prompted_cfg):
    with pytest.raises(NotImplementedError, match='nn.DataParallel.*use DistributedDataParallel'):
        build(prompted_cfg)._replicate_for_data_parallel()


# --- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize('options, error, match', [
    (dict(freeze='some'), ValueError, r"freeze must be one of \('pretrained', 'all'\), got 'some'"),
    (dict(last_stage='first'), ValueError, "last_stage must be one of .* got 'first'"),
    (dict(lean='yes'), TypeError, "lean must be True, False or a dict, got 'yes'"),
    (dict(lean=dict(round=True)), ValueError, "lean has no option 'round': expected rounds, rec"),
    (dict(lean=dict(rounds=1)), TypeError, 'lean.rounds must be True or False, got 1'),
    (dict(lean=dict(fold=1)), TypeError, 'lean.fold must be True or False, got 1'),
    (dict(lean=dict(fold=True, rounds=False)), ValueError,
     'lean.fold is the former name of lean.rounds, but they differ: remove lean.fold'),
    (dict(lean=dict(recompute=-1)), ValueError, 'lean.recompute must not be negative, got -1'),
    (dict(lean=dict(recompute='x')), TypeError, "lean.recompute must be a number, .* got 'x'"),
    (dict(lean=dict(attention=True)), ValueError, 'lean.attention must be one of .*, got True'),
    (dict(lean=dict(prompts='all')), ValueError, "lean.prompts must be one of .*, got 'all'"),
    (dict(backbone_dtype='int4'), ValueError, "backbone_dtype must be one of .* got 'int4'"),
    (dict(backbone_dtype='bfloat16', lean=False), ValueError, 'needs lean layers, but lean=False'),
    (dict(trainable='layer4'), TypeError, 'trainable must be a list of regular expressions'),
    (dict(trainable=None), TypeError, 'trainable must be a list of regular .*, got None'),
    (dict(stem='no'), TypeError, "stem must be True or False, got 'no'"),
    (dict(trainable=['layer9']), ValueError, r"backbone\.trainable: 'layer9' matches no parameter"),
    (dict(trainable=['(']), ValueError, r"trainable: '\(' is not a regular expression"),
    (dict(prompt='yes'), TypeError, 'prompt must be None or a dict'),
    (dict(prompt=dict(type='mmprotune.PromptBlock', reduction=999)), ValueError,
     'reduction=999 leaves no hidden channels'),
    (dict(prompt=dict(type='mmprotune.PromptBlock', zero_init=True), last_stage='serial'),
     ValueError, 'would kill the features'),
    (dict(stages=['nowhere']), ValueError, "has no module 'nowhere'"),
    (dict(stages=['layer4'], last_stage='none'), ValueError, 'no prompt is left'),
    (dict(init_cfg=dict(type='Kaiming')), ValueError, "init_cfg must be of type 'Pretrained'"),
    (dict(backbone='ResNet'), TypeError, 'backbone must be a dict with the key "type"'),
    (dict(backbone=dict(type='NoSuchNet')), KeyError, 'NoSuchNet is not in the'),
])
def test_bad_arguments(options, error, match):
    cfg = dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all')
    with pytest.raises(error, match=match):
        build({**cfg, **options})


@pytest.mark.parametrize('host', ['mmdet', 'mmseg', 'mmpretrain'])
def test_the_prefixed_name_works_in_every_host(host):
    import importlib
    registry = importlib.import_module(f'{host}.registry').MODELS
    with DefaultScope.overwrite_default_scope(host):
        model = registry.build(
            dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all'))
    assert isinstance(model, PromptedBackbone)


# --- state -----------------------------------------------------------------------------------


@pytest.mark.parametrize('state_dict', [lambda m: m.state_dict(), get_state_dict])
def test_state_dict_is_slim(prompted_cfg, state_dict):
    model = nn.Sequential()
    model.add_module('backbone', build(prompted_cfg))
    model.add_module('head', nn.BatchNorm2d(4))
    keys = set(state_dict(model))
    prompts = {f'backbone.prompts.{n}' for n in model.backbone.prompts.state_dict()}
    # Buffers of parts that train are kept: the norm layer's statistics.
    assert keys == prompts | {'backbone.frozen_fingerprint', 'backbone.frozen_function'} | {
        f'head.{n}' for n in model.head.state_dict()}


@pytest.mark.parametrize('copies', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_their_own_prompts(prompted_cfg, copies):
    model = build(prompted_cfg).eval()
    twin = copies(model)
    wake(twin)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)[0], plain(model)(x)[0])
        assert not torch.equal(twin(x)[0], model(x)[0])
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(x)[0], model(x)[0])


def test_hosts_find_the_backbones_own_attributes(prompted_cfg):
    model = build(prompted_cfg)
    assert model.out_indices == (0, 1, 2, 3)
    with pytest.raises(AttributeError):
        model.no_such_attribute  # noqa: B018


def test_what_the_file_left_is_logged(prompted_cfg, caplog, monkeypatch):
    lines = []
    monkeypatch.setattr('mmprotune.models.prompting.print_log',
                        lambda text, logger=None, level=logging.INFO: lines.append((level, text)))
    prompted_cfg.update(lean=False)
    prompted_cfg['backbone']['out_indices'] = (0, 1)
    model = build(prompted_cfg)
    assert len(model.prompts) == 2
    assert [level for level, _ in lines] == [logging.WARNING]
    assert 'no prompt at layer3 (32 channels), layer4 (64 channels)' in lines[0][1]


@pytest.mark.parametrize('cfg, more', [
    (dict(type='mmseg.PIDNet', channels=8, ppm_channels=8, num_stem_blocks=1,
          num_branch_blocks=1), True),
    (dict(type='mmpretrain.InceptionV3', num_classes=10, aux_logits=True), True),
    # Its own backward inverts its layers, and knows no prompts in them.
    (dict(type='mmpretrain.RevVisionTransformer', img_size=64, arch=dict(
        embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)), False),
], ids=lambda value: value['type'] if isinstance(value, dict) else '')
def test_a_backbone_that_returns_more_in_training_is_told_the_mode(cfg, more):
    """What its auxiliary heads ask for; its layers stay in eval mode."""
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=cfg, freeze='all')).train()
    assert model.backbone.training is more
    assert not any(m.training for m in list(model.backbone.modules())[1:])
    audit(model, training=True)
    size = 299 if 'Inception' in cfg['type'] else 64
    x = torch.randn(2, 3, size, size)
    counts = [len(list(tensors_in(model.train(mode)(x)))) for mode in (True, False)]
    assert (counts[0] > counts[1]) is more
    assert not model.backbone.training


TRIDENT = dict(type='mmdet.TridentResNet', depth=50, num_stages=3, strides=(1, 2, 2),
               dilations=(1, 1, 1), out_indices=(2, ), base_channels=4, stem_channels=4,
               num_branch=3, test_branch_idx=1, trident_dilations=(1, 2, 3))


def test_layers_that_return_more_in_training_are_told_the_mode(tmp_path):
    """TridentNet's last stage runs in three branches then, and the detector counts on them; frozen
    layers around them, and layers that only drop at random, stay in eval mode."""
    torch.manual_seed(0)
    stock = DET_MODELS.build(dict(TRIDENT))
    with torch.no_grad():
        for name, tensor in stock.state_dict().items():
            if 'conv' in name:
                nn.init.kaiming_normal_(tensor)
    torch.save(stock.state_dict(), tmp_path / 'trident.pth')
    backbone = dict(TRIDENT, init_cfg=dict(type='Pretrained', checkpoint=f'{tmp_path}/trident.pth'))
    gradients = []
    for lean in (True, False):
        torch.manual_seed(1)
        model = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone, lean=lean))
        wake(model)
        model.train()
        audit(model, training=True)
        told = {n for n, m in model.backbone.named_modules() if m.training}
        assert told == {f'layer3.{i}{conv}' for i in range(6) for conv in ('', '.conv2')}
        out, = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)))
        assert len(out) == 6
        out.square().sum().backward()
        gradients.append([p.grad for p in model.prompts.parameters()])
        assert not any(m.training for m in model.eval().modules())
        assert len(model(torch.randn(2, 3, 64, 64))[0]) == 2
    assert all(g.any() for g in gradients[0])
    for lean, ordinary in zip(*gradients):
        atol = 1e-3 * float(ordinary.abs().max())
        torch.testing.assert_close(lean, ordinary, rtol=1e-3, atol=atol)


MASKED = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)


def test_a_backbone_that_wants_a_mask_has_stages():
    """Its file may serve to train on from, and its forward without a mask is that of a ViT."""
    model = build(dict(type='mmprotune.PromptedBackbone', freeze='all', backbone=dict(
        type='mmpretrain.MaskFeatViT', arch=MASKED, img_size=64, patch_size=16))).train()
    wake(model)
    assert len(model.prompts) == 2 and model.frozen_function.any()
    x, mask = torch.randn(2, 3, 64, 64), torch.arange(16).expand(2, 16) % 2
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        for net in (model, copied):
            plain, none, first, second = (
                list(tensors_in(net(x, *args, **kwargs)))[-1]
                for args, kwargs in (
                    ((), {}), ((None, ), {}), ((mask, ), {}), ((), dict(mask=mask))))
            assert torch.equal(plain, none) and torch.equal(first, second)
            assert not torch.equal(plain, first)
    with pytest.raises(TypeError, match='mask'):
        copied.unwrap()(x)


def test_another_way_through_the_backbone_is_refused():
    """With a mask, SimMIM down-samples inside of a stage, without one behind it."""
    cfg = dict(type='mmprotune.PromptedBackbone', freeze='all', backbone=dict(
        type='mmpretrain.SimMIMSwinTransformer', img_size=64, arch=dict(
            embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
        stage_cfgs=dict(block_cfgs=dict(window_size=2))))
    x, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 16, 16)
    model = build(cfg)
    with pytest.raises(ValueError, match=r'stages.0: its feature had 16 channels .* has 32 .*'
                       r'model.backbone.stages='):
        model(x, mask)
    model = build(dict(cfg, stages=[f'stages.{i}.blocks.0' for i in range(4)]))
    assert model(x, mask)[0].shape == (2, 128, 2, 2)


def test_a_file_of_a_part_of_the_backbone(resnet18_file):
    """The part is frozen, what stands beside it trains."""
    inner = dict(RESNET18, out_indices=(0, 1, 2, 3), init_cfg=dict(
        type='Pretrained', checkpoint=resnet18_file))
    model = build(dict(type='mmprotune.PromptedBackbone', prompt=None, backbone=dict(
        type='mmseg.BiSeNetV1', backbone_cfg=inner, spatial_channels=(8, 8, 8, 16),
        context_channels=(16, 32, 64), out_channels=16)))
    trains = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert model.frozen_source == resnet18_file
    assert trains and not any(n.startswith('context_path.backbone.') for n in trains)
    assert 'context_path.backbone.conv1.weight' in model.frozen_names


def test_an_init_cfg_without_a_type(tmp_path):
    """As mmdet's PVT takes it."""
    cfg = dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=8, num_layers=[1, 1, 1, 1])
    torch.manual_seed(1)
    torch.save(DET_MODELS.build(dict(cfg)).state_dict(), tmp_path / 'pvt.pth')
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=dict(
        cfg, init_cfg=dict(checkpoint=str(tmp_path / 'pvt.pth')))))
    assert model.frozen_source == str(tmp_path / 'pvt.pth')
    assert not any(p.requires_grad for p in model.backbone.parameters())


# --- the backbone back --------------------------------------------------------------------------


@pytest.mark.parametrize('cfg', [RESNET18, SWIN], ids=lambda c: c['type'])
@pytest.mark.parametrize('copies', [
    lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_unwrap_gives_the_stock_backbone_back(cfg, copies):
    stock = DET_MODELS.build(dict(cfg))
    stock.eval()
    first = build(dict(type='mmprotune.PromptedBackbone', backbone=cfg, freeze='all'))
    model = copies(first).eval()
    wake(model)
    stock.load_state_dict(model.backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    blocks = list(model.prompts.modules())
    assert model.lean_report.covered and any(m._forward_hooks for m in model.backbone.modules())
    net = model.unwrap()
    assert net is model.backbone
    assert [type(m) for m in net.modules()] == [type(m) for m in stock.modules()]
    assert not any(m._forward_hooks or any(n.startswith('lean_') for n in vars(m))
                   for m in (*net.modules(), *blocks))
    with torch.no_grad():
        assert all(map(torch.equal, net(x), stock(x)))
        assert all(map(torch.equal, model(x), stock(x)))  # a wrapper without prompts
        if copies is copy.deepcopy:  # whose original is as it was
            wake(first)
            assert not torch.equal(first.eval()(x)[0], net(x)[0])
    assert not model.prompts and not list(model.stages)
    audit(model)
    headless = build(dict(type='mmprotune.PromptedBackbone', backbone=cfg, freeze='all',
                          prompt=None))
    assert str(headless.load_state_dict(model.state_dict())) == '<All keys matched successfully>'


def test_hooks_of_others_stay():
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all'))
    seen = []
    model.backbone.layer1.register_forward_hook(lambda *_: seen.append(1))
    net = model.unwrap()
    seen.clear()
    net(torch.randn(1, 3, 64, 64))
    assert seen == [1]
