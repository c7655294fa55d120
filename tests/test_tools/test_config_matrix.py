"""The matrix of stock configs: two dozen of them here, sixty drawn ones under -m matrix."""
import importlib.util
import json
import resource
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from tests.test_tools.conftest import REPO

spec = importlib.util.spec_from_file_location(
    'config_matrix', REPO / 'tools/analysis_tools/config_matrix.py')
matrix = importlib.util.module_from_spec(spec)
sys.modules['config_matrix'] = matrix
spec.loader.exec_module(matrix)

TWENTY = [
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    # The init_cfg has no type.
    'mmdet::pvt/retinanet_pvtv2-b0_fpn_1x_coco.py',
    'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'mmdet::yolox/yolox_nano_8xb8-300e_coco.py',
    # The backbone's rate is a tenth.
    'mmdet::detr/detr_r18_8xb2-500e_coco.py',
    # The rate decays from layer to layer.
    'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    # The detector is part of a tracker, of a teacher and a student.
    'mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py',
    'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    # No pre-trained file but load_from.
    'mmdet::cityscapes/faster-rcnn_r50_fpn_1x_cityscapes.py',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py',
    'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    # Returns more in training.
    'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
    # The file is that of a part of the backbone, or there is none.
    'mmseg::bisenetv1/bisenetv1_r18-d32-in1k-pre_4xb8-160k_cityscapes-1024x1024.py',
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_coco-stuff164k-512x512.py',
    'mmseg::mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024.py',
    # Random weights in a deep network without shortcuts.
    'mmseg::mobilenet_v2/mobilenet-v2-d8_deeplabv3_4xb2-80k_cityscapes-512x1024.py',
    # The classifier's own init_cfg draws linear layers anew.
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
    'mmpretrain::deit/deit-tiny_4xb256_in1k.py',
    'mmpretrain::convnext_v2/convnext-v2-atto_32xb32_in1k.py',
    'mmpretrain::resnet/resnet18_8xb16_cifar10.py',
    'mmpretrain::simsiam/simsiam_resnet50_8xb32-coslr-100e_in1k.py',
]
SMALL = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'
SETTINGS = dict(memory=9, seconds=180, mmprotune='1', torch='2+cpu', mmdet='3', mmseg='1',
                mmpretrain='0')


def held() -> float:
    """Address space of this process in GB: a forked one starts with it."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    return pages * resource.getpagesize() / 1e9


def check(name: str, **limits) -> dict:
    # Beside other tests this process has grown far beyond what the tool itself holds.
    limits.setdefault('memory', 9 + held())
    result, = matrix.check_all(matrix.runs_of([name]), limits=matrix.Limits(**limits))
    return result


def result_of(name: str, verdict: str = 'pass', file: str = 'init_cfg', reason: str = '') -> dict:
    return dict(key=name, configs=[f'mmdet::{name}.py'], verdict=verdict, reason=reason, file=file,
                seconds=1.5)


@pytest.mark.parametrize('name', TWENTY)
def test_twenty(name):
    result = check(name)
    assert result['verdict'] == 'pass', result.get('traceback', result['reason'])
    assert result['prompts'] > 1 and result['configs'] == [name]


@pytest.mark.matrix
def test_sixty_drawn():
    results = list(matrix.check_all(matrix.sample(matrix.config_names(), 60, seed=0), jobs=2))
    assert sum(len(r['configs']) for r in results) == 60
    assert any(r['verdict'] == 'pass' for r in results)
    failed = {r['configs'][0]: r['reason'] for r in results if r['verdict'] == 'fail'}
    # Those that docs/configs.md names with their reason.
    lines = (REPO / 'docs/results/config_matrix.jsonl').read_text().splitlines()
    known = {name for run in map(json.loads, lines[1:]) if run['verdict'] == 'fail'
             for name in run['configs']}
    assert set(failed) <= known, failed


# --- a broken promise is seen ----------------------------------------------------------------


def test_init_weights_that_moves_a_frozen_tensor_fails(monkeypatch):
    draw = matrix.PromptedBackbone.init_weights

    def init_weights(self):
        draw(self)
        next(self.backbone.parameters()).data.zero_()

    # Once before the snapshot is taken, by the constructor, that would do no harm.
    monkeypatch.setattr(matrix.PromptedBackbone, 'init_weights', init_weights)
    result = check(SMALL)
    assert result['verdict'] == 'fail'
    assert result['reason'].startswith('init_weights() moved 1 of')
    assert 'backbone.backbone.stem.conv.conv.weight' in result['reason']


def test_a_step_that_moves_a_frozen_tensor_fails(monkeypatch):
    forward = matrix.PromptedBackbone.forward

    def moving(self, *args):
        next(self.backbone.parameters()).data.add_(1)
        return forward(self, *args)

    monkeypatch.setattr(matrix.PromptedBackbone, 'forward', moving)
    result = check(SMALL)
    assert result['verdict'] == 'fail' and result['reason'].startswith('the step moved 1 of')


def test_frozen_modules_in_training_mode_fail(monkeypatch):
    monkeypatch.setattr(matrix.PromptedBackbone, 'train', torch.nn.Module.train)
    result = check(SMALL)
    assert result['verdict'] == 'fail' and 'in training mode' in result['reason']


def test_prompts_at_a_tenth_of_the_rate_fail(monkeypatch):
    wrap = matrix.protune

    def protune(cfg, **options):
        cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={'prompts': dict(lr_mult=0.1)})
        return wrap(cfg, **options)

    monkeypatch.setattr(matrix, 'protune', protune)
    result = check(SMALL)
    assert result['verdict'] == 'fail'
    assert result['reason'].startswith('the rate of 24 of 24 prompt parameters is not the head')
    assert 'trains at 0.001' in result['reason']


def test_prompts_outside_the_optimizer_fail():
    prompts = dict(inside=torch.nn.Parameter(torch.zeros(1)), out=torch.nn.Parameter(torch.ones(1)))
    fault, = matrix.wrong_rates(torch.optim.SGD([prompts['inside']], lr=0.1), prompts)
    assert fault == ("the rate of 1 of 2 prompt parameters is not the head's rate 0.1: "
                     'out is not in the optimizer')
    del prompts['out']
    assert matrix.wrong_rates(torch.optim.SGD(prompts.values(), lr=0.1), prompts) == []


def test_biases_may_have_the_rate_that_a_config_gives_all_of_them():
    bias, weight = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([dict(params=[bias], lr=0.2), dict(params=[weight])], lr=0.1)
    assert matrix.wrong_rates(optimizer, {'reduce.bias': bias, 'reduce.weight': weight}, 2.) == []
    fault, = matrix.wrong_rates(optimizer, {'reduce.weight': bias, 'reduce.bias': weight}, 2.)
    assert fault.endswith('reduce.weight trains at 0.2')


def test_the_rate_of_the_head_is_the_one():
    model = torch.nn.ModuleDict(dict(decode_head=torch.nn.Linear(3, 3), neck=torch.nn.Linear(9, 9)))
    groups = [dict(params=[model.decode_head.weight], lr=1.), dict(params=[model.decode_head.bias]),
              dict(params=model.neck.parameters())]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert matrix.head_rate(optimizer, model) == 1.
    prompts = {'reduce.weight': model.neck.weight}
    fault, = matrix.wrong_rates(optimizer, prompts, 1., 1.)
    assert fault.endswith("is not the head's rate 1: reduce.weight trains at 0.1")
    del model['decode_head']
    assert matrix.head_rate(optimizer, model) is None


def test_prompts_without_gradients_fail(monkeypatch):
    monkeypatch.setattr(matrix.PromptedBackbone, 'apply_prompt', lambda self, stage, x, *args: x)
    result = check(SMALL)
    assert result['verdict'] == 'fail'
    assert result['reason'].startswith('no gradient for 24 of 24 prompt parameters')


# --- what ends a process ---------------------------------------------------------------------


def spin(*args):
    while True:
        pass


def leave(*args):
    import os
    os._exit(3)


def too_much(*args):
    bytearray(10**15)


@pytest.mark.parametrize('body, reason', [
    (spin, 'not within 1 s'), (leave, 'the process ended with status 3:'),
    (too_much, 'not within 99 GB'), (lambda *args: {}['x'], "KeyError: 'x'")
])
def test_a_stock_model_that_ends_badly_says_nothing_about_prompts(monkeypatch, body, reason):
    monkeypatch.setattr(matrix, 'check_stock', body)
    result = check(SMALL, seconds=1, memory=99)
    assert (result['verdict'], result['reason']) == ('host', reason)
    monkeypatch.setattr(matrix, 'check_stock', lambda *args: dict(size=64, finite=True))
    monkeypatch.setattr(matrix, 'check_stock_step', lambda *args: {})
    monkeypatch.setattr(matrix, 'check_prompted', body)
    result = check(SMALL, seconds=1, memory=99)
    assert (result['verdict'], result['reason'], result['size']) == ('fail', reason, 64)
    assert json.dumps(result)


def test_a_stock_model_that_takes_no_step_says_nothing_about_prompts(monkeypatch):
    """Its losses were computed, but the prompted model's failure may be its own."""
    monkeypatch.setattr(matrix, 'check_prompted', lambda *args: dict(faults=['no step']))
    assert check(SMALL)['verdict'] == 'fail'
    update = matrix.build_optim_wrapper

    def build(*args):
        wrapper = update(*args)
        wrapper.optimizer.register_step_pre_hook(lambda *args: {}['x'])
        return wrapper

    monkeypatch.setattr(matrix, 'build_optim_wrapper', build)
    result = check(SMALL)
    assert (result['verdict'], result['reason']) == ('host', "KeyError: 'x'")


# --- the weights of the stock model ----------------------------------------------------------


def test_norms_fit_the_weights_and_constants_move(tmp_path):
    run, = matrix.runs_of([SMALL])
    drawn = matrix._stock(run)[0].backbone.state_dict()
    result = matrix.check_stock(run, tmp_path)
    assert result == dict(size=128, larger=[320, 512], finite=True)
    weights = torch.load(tmp_path / 'backbone.pth')
    assert all(not torch.equal(weights[k], v) for k, v in drawn.items()
               if k.endswith(('weight', 'bias')))
    means = {k: v for k, v in weights.items() if k.endswith('running_mean')}
    assert means and all(v.any() for v in means.values())


def test_statistics_of_a_few_values_are_not_taken():
    norms = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    for norm, side in zip(norms, (2, 3)):
        norm.register_forward_hook(matrix._forget_few_values)
        norm(torch.rand(2, 3, side, side))
    assert not norms[0].running_mean.any() and norms[1].running_mean.all()


# --- configs ---------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Configs that a library called mmdet ships."""
    files = dict(
        a="model = dict(type='A', backbone=dict(type='B'))", b='x = 1', c='x =',
        d="_base_ = 'a.py'\ntrain_cfg = dict(max_epochs=3)",
        e="_base_ = 'a.py'\nload_from = 'file.pth'")
    (tmp_path / '_base_').mkdir()
    (tmp_path / '_base_' / 'f.py').write_text(files['a'])
    for name, text in files.items():
        (tmp_path / f'{name}.py').write_text(text)
    monkeypatch.setattr(matrix, 'root', lambda library: tmp_path)
    monkeypatch.setattr(matrix, 'LIBRARIES', ('mmdet', ))
    return [f'mmdet::{name}.py' for name in files]


def test_the_same_work_is_done_once(shipped):
    assert matrix.config_names() == shipped
    runs = matrix.runs_of(shipped)
    assert [run.configs for run in runs] == [['mmdet::a.py', 'mmdet::d.py'], ['mmdet::c.py'],
                                             ['mmdet::e.py']]
    assert 'SyntaxError' in runs[1].error
    result, = matrix.check_all(runs[1:2])
    assert result['verdict'] == 'host' and result['reason'].startswith('the config does not load')
    drawn = [matrix.sample(shipped, 3, seed) for seed in (1, 1)]
    assert [r.configs for r in drawn[0]] == [r.configs for r in drawn[1]]
    assert sum(len(r.configs) for r in drawn[0]) == 3


FILE = dict(type='Pretrained', checkpoint='https://example.org/x.pth', prefix='backbone')


@pytest.mark.parametrize('model, load_from, key', [
    (dict(backbone=dict(type='ResNet', init_cfg=FILE)), None, 'init_cfg'),
    (dict(backbone=dict(type='ResNet', init_cfg=[dict(type='Kaiming'), FILE])), None, 'init_cfg'),
    (dict(backbone=dict(type='PVT', init_cfg=dict(checkpoint='x.pth'))), 'y.pth', 'init_cfg'),
    (dict(backbone=dict(type='TIMMBackbone', pretrained=True)), None, 'pretrained'),
    (dict(backbone=dict(type='ResNet'), pretrained='x.pth'), None, 'model.pretrained'),
    (dict(backbone=dict(type='BiSeNetV1', backbone_cfg=dict(init_cfg=FILE))), None,
     'backbone_cfg.init_cfg'),
    (dict(detector=dict(backbone=dict(type='ResNet', init_cfg=FILE))), None, 'init_cfg'),
    (dict(backbone=dict(type='ResNet')), 'y.pth', 'load_from'),
    (dict(backbone=dict(type='ResNet'), head=dict(init_cfg=FILE)), None, matrix.NO_FILE),
])
def test_the_file_is_named_where_the_config_names_one(model, load_from, key, tmp_path):
    original = Config(dict(model=model, load_from=load_from, default_scope='mmdet'))
    before = original.to_dict()
    assert matrix.file_key(original) == key
    cfg = matrix.runnable(original)
    assert 'example.org' not in str(cfg.to_dict()) and 'x.pth' not in str(cfg.to_dict())
    options = matrix.point(cfg, original, tmp_path)
    assert original.to_dict() == before
    text = str(cfg.model.to_dict())
    assert ('backbone.pth' in text) == (key not in ('load_from', matrix.NO_FILE))
    # A backbone may forbid an init_cfg.
    file = dict(frozen_from=str(tmp_path / 'backbone.pth'))
    assert options == (file if key == matrix.NO_FILE else {})
    assert cfg.load_from == (str(tmp_path / 'model.pth') if load_from else None)
    if model.get('detector'):
        assert cfg.model.detector.backbone.init_cfg.prefix == 'backbone'


def test_a_config_becomes_one_that_a_cpu_can_run():
    cfg = matrix.runnable(Config(dict(
        model=dict(type='EncoderDecoder', backbone=dict(norm_cfg=dict(type='MMSyncBN')),
                   train_cfg=dict(num_points=12544, rpn=dict(sampler=dict(num=8)),
                                  rcnn=[dict(sampler=dict(num=512, pos_fraction=0.25))])),
        data_preprocessor=dict(type='SegDataPreProcessor', size=(512, 512)),
        optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic', accumulative_counts=4,
                           optimizer=dict(type='SGD', lr=0.1)),
        default_scope='mmseg')))
    assert cfg.optim_wrapper == dict(type='OptimWrapper', accumulative_counts=1,
                                     optimizer=dict(type='SGD', lr=0.1))
    assert cfg.model.data_preprocessor == dict(type='SegDataPreProcessor', size_divisor=1)
    assert cfg.model.backbone.norm_cfg.type == 'SyncBN'
    assert cfg.model.train_cfg == dict(num_points=512, rpn=dict(sampler=dict(num=8)), rcnn=[
        dict(sampler=dict(num=32, pos_fraction=0.25))])


# --- the log and the table -------------------------------------------------------------------


def test_a_command_that_was_cut_off_goes_on(shipped, tmp_path, monkeypatch, capsys):
    checked = []

    def check_all(runs, jobs, limits):
        for run in runs:
            checked.append(run.configs[0])
            yield dict(result_of('x'), key=run.key, configs=run.configs)

    monkeypatch.setattr(matrix, 'check_all', check_all)
    log, table = tmp_path / 'log' / 'x.jsonl', tmp_path / 'docs' / 'configs.md'
    assert matrix.main(['--log', str(log), '--only', '*::[ac].py']) == 0
    assert checked == ['mmdet::a.py', 'mmdet::c.py']
    with log.open('a') as file:
        file.write('{"key": "cut o')
    assert matrix.main(['--log', str(log), '--out', str(table)]) == 0
    assert checked == ['mmdet::a.py', 'mmdet::c.py', 'mmdet::e.py']
    assert len(log.read_text().splitlines()) == 4
    # The run of a.py stands for d.py, too.
    assert '| mmdet::a.py | 2 | init_cfg |' in table.read_text()
    assert '4 of 4 configs' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        matrix.main(['--log', str(log), '--seconds', '7'])
    assert 'was begun with' in capsys.readouterr().err


def test_a_file_that_is_no_log_stays_as_it_is(tmp_path):
    path = tmp_path / 'thesis.txt'
    for text in ('One.\nTwo.\n', 'One line', '{"key": "x"}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match='thesis.txt'):
            matrix.Log(path, SETTINGS)
        assert path.read_text() == text


@pytest.mark.parametrize('arguments, message', [
    (['--only', 'no such config'], "'no such config' matches none"),
    (['--jobs', '0'], '--jobs must be more than 0, got 0'),
    (['--memory', '-1'], '--memory must be more than 0, got -1'),
    (['--sample', '0'], '--sample must be more than 0, got 0'),
])
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        matrix.main(arguments)
    assert message in capsys.readouterr().err


def test_a_failure_is_the_exit_status(shipped, monkeypatch):
    monkeypatch.setattr(matrix, 'check_all', lambda runs, *args: iter(
        [dict(result_of('x', 'fail', reason='no'), key=run.key) for run in runs]))
    assert matrix.main(['--only', '*a.py']) == 1


def test_the_table():
    results = [
        result_of('b'), dict(result_of('a', file='none'), configs=['mmseg::a.py', 'mmseg::c.py'],
                             size=64, prompts=4),
        result_of('d', 'fail', reason='no | gradient'), result_of('e', 'host', reason='too large')
    ]
    line = matrix.summary(results)
    assert line == ('3 of 4 configs whose stock model runs here pass (75.0%): 1 of 2 of those that '
                    'name a pre-trained file, 2 of 2 of those that name no pre-trained file; '
                    '1 more do not run here')
    assert matrix.summary([]).startswith('0 of 0 configs whose stock model runs here pass: ')
    text = matrix.markdown(results, SETTINGS, 'make')
    assert line in text and '9 GB of address space and 180 s of processor time' in text
    assert '| mmdet | 3 | 3 | 1 | 1 | 1 |' in text and '| mmseg | 2 | 1 | 2 | 0 | 0 |' in text
    assert '| mmdet::d.py | 1 | init_cfg | no / gradient |' in text
    assert '| mmseg::a.py | 2 | none | 64 | 4 | 1.5 | pass |' in text
    assert '| mmdet::e.py | 1 | init_cfg |  |  | 1.5 | host: too large |' in text
