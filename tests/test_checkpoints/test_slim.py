"""Slim checkpoints, from the Runner's own saving and by the tool's verbs."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint

from mmprotune import checkpoint, prompt_parameters
from mmprotune.checkpoints.convert import build_model
from mmprotune.errors import (
    CheckpointError,
    FingerprintMismatch,
    IncompleteCheckpoint,
    UnreadableCheckpoint,
)
from tests.conftest import RESNET18, build, wake
from tests.detection import detector_cfg, draw_coco, run

from .models import prompted_config

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, resnet18_file):
    """A prompted detector after two epochs through Runner: (config, checkpoint file)."""
    folder = tmp_path_factory.mktemp('trained')
    draw_coco(folder)
    cfg = detector_cfg(_prompted(resnet18_file), folder, folder / 'run')
    run(cfg)
    cfg.dump(str(folder / 'config.py'))
    return cfg, str(folder / 'run/epoch_2.pth')


def _prompted(file, **options):
    return {
        'type': 'mmprotune.PromptedBackbone',
        'backbone': dict(RESNET18, init_cfg=dict(type='Pretrained', checkpoint=file)),
        **options
    }


def _copy(cfg):
    return Config(cfg._cfg_dict.to_dict())


def _model(cfg):
    model = build_model(cfg)
    wake(model, seed=5)  # so that loading has something to change
    return model


def _altered(path, out, change):
    """A copy of a checkpoint with its state dict changed."""
    content = torch.load(path, weights_only=True)
    change(content['state_dict'])
    torch.save(content, out)
    return str(out)


# --- what a run writes -----------------------------------------------------------------------


def test_a_runs_checkpoint_is_slim_and_safe(trained):
    cfg, path = trained
    content = torch.load(path, weights_only=True)  # would raise on anything but plain data
    keys = set(content['state_dict'])
    assert not any(k.startswith('backbone.backbone.') for k in keys)
    assert 'backbone.frozen_fingerprint' in keys
    assert content['meta']['epoch'] == 2
    assert content['meta']['mmprotune']['backbones']['backbone']['type'] == 'ResNet'
    info = checkpoint.inspect(path)
    assert info['kind'] == 'slim' and info['resumable']
    assert [s['path'] for s in info['backbones']['backbone']['stages']] == [
        'layer1', 'layer2', 'layer3', 'layer4']


def test_same_boxes_from_slim_and_merged(trained, tmp_path):
    """Runner.test, init_detector and DetInferencer; slim against merged, and merged by another
    way: the frozen backbone of the config is random then, so the merged file must fill it."""
    cfg, slim = trained
    full = str(tmp_path / 'full.pth')
    assert checkpoint.merge(slim, cfg, full)['kind'] == 'full'
    random_cfg = _copy(cfg)
    random_cfg.model.backbone['freeze'] = 'all'
    random_cfg.model.backbone.backbone.init_cfg = None

    image = str(Path(cfg.test_dataloader.dataset.data_root) / '0.png')
    boxes = {}
    for name, (config, file) in dict(slim=(cfg, slim), full=(random_cfg, full)).items():
        model = init_detector(_copy(config), file, device='cpu')
        found = inference_detector(model, image).pred_instances
        inferencer = DetInferencer(
            model=_copy(config), weights=file, device='cpu',
            show_progress=False)
        also = inferencer(image, return_datasamples=True)['predictions'][0].pred_instances
        tested = _copy(config)
        tested.load_from = file
        tested.work_dir = str(tmp_path / name)
        tested.test_evaluator.outfile_prefix = str(tmp_path / name / 'out')
        run(tested, train=False)
        dumped = json.loads((tmp_path / name / 'out.bbox.json').read_text())
        boxes[name] = (found.bboxes, found.scores, also.bboxes, dumped)
    assert len(boxes['slim'][0]) > 0
    for a, b in zip(boxes['slim'][:3], boxes['full'][:3]):
        assert torch.equal(a, b)
    assert torch.equal(boxes['slim'][0], boxes['slim'][2])
    assert boxes['slim'][3] == boxes['full'][3] and boxes['slim'][3]


def test_resume_reproduces_the_uninterrupted_run(trained, tmp_path):
    """Bitwise, with augmentations, an optimizer with state, and validation in between."""
    cfg, path = trained
    first = _copy(cfg)
    first.work_dir = str(tmp_path / 'run')
    first.train_cfg.max_epochs = 1
    first.train_cfg.val_interval = 1
    run(first)
    again = _copy(cfg)
    again.work_dir = first.work_dir
    again.resume = True
    again.randomness = dict(seed=123)  # the checkpoint's seed must win
    runner = run(again)
    assert runner.epoch == 2
    expected = torch.load(path, weights_only=True)
    found = torch.load(tmp_path / 'run/epoch_2.pth', weights_only=True)
    for key, value in expected['state_dict'].items():
        assert torch.equal(found['state_dict'][key], value), key
    before = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=True)['state_dict']
    assert any(not torch.equal(before[k], v) for k, v in expected['state_dict'].items())


def test_ema_save_best_and_max_keep(trained, tmp_path):
    cfg, _ = trained
    cfg = _copy(cfg)
    cfg.work_dir = str(tmp_path / 'run')
    cfg.custom_hooks.append(dict(type='EMAHook', update_buffers=True))
    cfg.train_cfg.update(max_epochs=3, val_interval=1)
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1, save_best='coco/bbox_mAP', rule='greater')
    run(cfg)
    names = sorted(p.name for p in (tmp_path / 'run').glob('*.pth'))
    assert 'epoch_3.pth' in names and 'epoch_2.pth' not in names
    assert any(n.startswith('best_coco_bbox_mAP') for n in names)
    content = torch.load(tmp_path / 'run/epoch_3.pth', weights_only=True)
    assert not any('backbone.backbone.' in k for k in content['ema_state_dict'])
    key = 'backbone.prompts.stage1.reduce.weight'
    assert not torch.equal(content['state_dict'][key], content['ema_state_dict'][f'module.{key}'])

    cfg.resume = True
    cfg.train_cfg.max_epochs = 4
    assert run(cfg).epoch == 4


def test_a_stock_checkpoint_fills_the_backbone(trained, tmp_path, resnet18_file):
    """A plain detector trained by Runner, with MMEngine's own pickles in its file."""
    cfg, _ = trained
    stock = _copy(cfg)
    stock.model.backbone = dict(RESNET18)
    stock.custom_hooks = []
    stock.work_dir = str(tmp_path / 'stock')
    stock.train_cfg.max_epochs = 1
    weights = run(stock).model.state_dict()
    path = str(tmp_path / 'stock/epoch_1.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # what MMEngine alone would run into

    prompted = _copy(cfg)
    prompted.load_from = path
    prompted.work_dir = str(tmp_path / 'prompted')
    runner = Runner.from_cfg(prompted)
    model = runner.model
    before = model.backbone.frozen_fingerprint.clone()
    runner.load_or_resume()
    for key, value in weights.items():
        own = key.replace('backbone.', 'backbone.backbone.', 1)
        assert torch.equal(model.get_parameter(own) if own in dict(model.named_parameters())
                           else model.get_buffer(own), value), key
    assert not torch.equal(model.backbone.frozen_fingerprint, before)
    # No key of the backbone is missing for MMEngine or PyTorch.
    result = model.load_state_dict(dict(weights), strict=False)
    assert not result.missing_keys and not result.unexpected_keys


def test_head_only_merges_to_the_stock_layout(trained, tmp_path, resnet18_file):
    cfg, _ = trained
    head_only = detector_cfg(_prompted(resnet18_file, prompt=None),
                             Path(cfg.train_dataloader.dataset.data_root), tmp_path / 'run',
                             train_cfg=dict(max_epochs=1))
    run(head_only)
    out = str(tmp_path / 'stock.pth')
    assert checkpoint.merge(str(tmp_path / 'run/epoch_1.pth'), head_only, out)['kind'] == 'stock'
    stock = _copy(head_only)
    stock.model.backbone = dict(RESNET18)
    model = build(stock.model)
    assert str(model.load_state_dict(torch.load(out, weights_only=True)['state_dict'])) == \
        '<All keys matched successfully>'
    assert torch.equal(model.backbone.conv1.weight, torch.load(resnet18_file)['conv1.weight'])
    # And back again.
    slim = str(tmp_path / 'slim.pth')
    assert checkpoint.extract(out, head_only, slim)['kind'] == 'slim'
    a = torch.load(slim, weights_only=True)['state_dict']
    b = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=True)['state_dict']
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- files that must not load ----------------------------------------------------------------


class Evil:

    def __reduce__(self):
        return os.system, ('echo run > evil.txt', )


def _bad_files(path, folder, other):
    """name -> (file, error, part of the message)"""
    data = Path(path).read_bytes()
    files = {}

    def raw(name, content, match):
        (folder / f'{name}.pth').write_bytes(content)
        files[name] = str(folder / f'{name}.pth'), UnreadableCheckpoint, match

    raw('empty', b'', 'truncated or no PyTorch checkpoint')
    raw('half', data[:len(data) // 2], 'truncated or no PyTorch checkpoint')
    raw('tail', data[:-30], 'truncated or no PyTorch checkpoint')
    raw('text', b'version https://git-lfs.github.com/spec/v1\n', 'no PyTorch checkpoint')
    raw('pickle', pickle.dumps(Evil()), r'posix\.system|no PyTorch checkpoint')
    torch.save(dict(state_dict=dict(a=Evil())), folder / 'zip_pickle.pth')
    files['zip_pickle'] = (str(folder / 'zip_pickle.pth'), UnreadableCheckpoint,
                           r'refused: its pickle calls for posix\.system.*Nothing in it was run')
    torch.save([1, 2], folder / 'list.pth')
    files['list'] = str(folder / 'list.pth'), UnreadableCheckpoint, 'expected a state dict'

    def altered(name, change, error, match):
        files[name] = _altered(path, folder / f'{name}.pth', change), error, match

    altered('no_head', lambda s: [s.pop(k) for k in list(s) if k.startswith('roi_head')],
            IncompleteCheckpoint, r'missing: roi_head\.bbox_head')
    altered('classes', lambda s: s.update({
        'roi_head.bbox_head.fc_cls.weight': torch.zeros(5, 16),
        'roi_head.bbox_head.fc_cls.bias': torch.zeros(5)}), IncompleteCheckpoint,
        r'other shapes: roi_head\.bbox_head\.fc_cls\.bias: expected \(3,\), got \(5,\)')
    altered('left_over', lambda s: s.update({'backbone.prompts.stage9.x': torch.zeros(1)}),
            IncompleteCheckpoint, r'not expected: prompts\.stage9\.x')
    altered('one_prompt_less', lambda s: s.pop('backbone.prompts.stage3.expand.bias'),
            IncompleteCheckpoint, r'missing: prompts\.stage3\.expand\.bias')
    altered('prompt_shape', lambda s: s.update({
        'backbone.prompts.stage1.reduce.weight': torch.zeros(4, 8, 1, 1)}), IncompleteCheckpoint,
        r'other shapes: prompts\.stage1\.reduce\.weight: expected \(2, 8, 1, 1\), got \(4, 8')
    altered('fingerprint', lambda s: s['backbone.frozen_fingerprint'].add_(1),
            FingerprintMismatch, 'trained on another frozen backbone: expected fingerprint')
    altered('no_fingerprint', lambda s: s.pop('backbone.frozen_fingerprint'),
            IncompleteCheckpoint, 'neither the frozen backbone nor its fingerprint')
    altered('half_backbone', lambda s: s.update({
        'backbone.backbone.conv1.weight': torch.zeros(8, 3, 7, 7)}), IncompleteCheckpoint,
        r'missing: backbone\.bn1\.bias')
    return files


def test_bad_files_do_not_load_and_change_nothing(trained, tmp_path, other_resnet18_file,
                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg, path = trained
    model = _model(cfg)
    before = {k: v.clone() for k, v in checkpoint.full_state_dict(model).items()}
    for name, (file, error, match) in _bad_files(path, tmp_path, other_resnet18_file).items():
        with pytest.raises(error, match=match) as caught:
            checkpoint.load(model, file)
        assert os.path.basename(file) in str(caught.value), name
        # The tool's verbs refuse it too, and write nothing.
        for verb in (checkpoint.merge, checkpoint.extract):
            with pytest.raises(CheckpointError):
                verb(file, cfg, tmp_path / 'out.pth')
        assert not (tmp_path / 'out.pth').exists()
    after = checkpoint.full_state_dict(model)
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert not (tmp_path / 'evil.txt').exists()
    checkpoint.load(model, path)  # the good one does change it
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('name', ['no_head', 'classes', 'fingerprint', 'zip_pickle', 'half',
                                  'one_prompt_less'])
def test_runner_refuses_them(trained, tmp_path, other_resnet18_file, name):
    cfg, path = trained
    file, error, match = _bad_files(path, tmp_path, other_resnet18_file)[name]
    cfg = _copy(cfg)
    cfg.load_from = file
    with pytest.raises(error, match=match):
        run(cfg, train=False)


def test_another_backbone_is_refused_by_every_loader(trained, other_resnet18_file):
    cfg, path = trained
    cfg = _copy(cfg)
    cfg.model.backbone.backbone.init_cfg.checkpoint = other_resnet18_file
    for attempt in (
            lambda: checkpoint.load(build_model(cfg), path),
            lambda: checkpoint.verify(path, cfg),
            lambda: load_checkpoint(build_model(cfg), path),  # MMEngine's, not strict
            lambda: init_detector(_copy(cfg), path, device='cpu'),
            lambda: build_model(cfg).load_state_dict(
                torch.load(path, weights_only=True)['state_dict'], strict=False)):
        with pytest.raises(FingerprintMismatch, match='check backbone.init_cfg'):
            attempt()


def test_strict_false_lets_another_head_through(trained, tmp_path):
    cfg, path = trained
    file = _altered(path, tmp_path / 'head.pth', lambda s: s.update({
        'roi_head.bbox_head.fc_cls.weight': torch.zeros(5, 16)}))
    cfg = _copy(cfg)
    cfg.load_from = file
    cfg.custom_hooks[0].strict = False
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    expected = torch.load(path, weights_only=True)['state_dict']['neck.fpn_convs.0.conv.weight']
    assert torch.equal(runner.model.neck.fpn_convs[0].conv.weight, expected)


def test_verify_finds_values_that_are_not_finite(trained, tmp_path):
    cfg, path = trained
    assert checkpoint.verify(path, cfg)['kind'] == 'slim'
    file = _altered(path, tmp_path / 'nan.pth',
                    lambda s: s['backbone.prompts.stage2.expand.bias'].fill_(float('nan')))
    with pytest.raises(CheckpointError, match=r'not finite in backbone\.prompts\.stage2\.expand'):
        checkpoint.verify(file, cfg)


def test_a_full_file_put_together_from_two_is_refused(trained, tmp_path):
    cfg, path = trained
    full = str(tmp_path / 'full.pth')
    checkpoint.merge(path, cfg, full)
    mixed = _altered(full, tmp_path / 'mixed.pth',
                     lambda s: s['backbone.backbone.conv1.weight'].add_(1))
    with pytest.raises(FingerprintMismatch, match='damaged or was put together from two'):
        checkpoint.load(_model(cfg), mixed)


def test_extract_refuses_a_backbone_that_is_not_the_configs(trained, tmp_path, other_resnet18_file):
    cfg, path = trained
    other = _copy(cfg)
    other.model.backbone.backbone.init_cfg.checkpoint = other_resnet18_file
    full = str(tmp_path / 'full.pth')
    checkpoint.merge(path, cfg, full)
    with pytest.raises(FingerprintMismatch, match='a slim file of it could not be used'):
        checkpoint.extract(full, other, tmp_path / 'slim.pth')
    assert checkpoint.extract(full, cfg, tmp_path / 'slim.pth')['kind'] == 'slim'


def test_nothing_is_overwritten(trained, tmp_path):
    cfg, path = trained
    out = tmp_path / 'out.pth'
    out.write_text('precious')
    with pytest.raises(FileExistsError, match='nothing was written'):
        checkpoint.merge(path, cfg, out)
    assert out.read_text() == 'precious'
    with pytest.raises(CheckpointError, match='the same file'):
        checkpoint.merge(path, cfg, path, force=True)


def test_a_config_without_prompts_is_named(trained):
    cfg, path = trained
    cfg = _copy(cfg)
    cfg.model.backbone = dict(RESNET18)
    with pytest.raises(CheckpointError, match='holds no PromptedBackbone'):
        checkpoint.verify(path, cfg)


# --- the tool --------------------------------------------------------------------------------


def _tool(*args):
    return subprocess.run(
        [sys.executable, str(REPO / 'tools/prompt_checkpoint.py'), *map(str, args)],
        capture_output=True, text=True, timeout=300,
        env=dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS='1'))


def test_the_tool(trained, tmp_path):
    cfg, path = trained
    config = Path(cfg.work_dir).parent / 'config.py'
    done = _tool('info', path)
    assert done.returncode == 0 and 'slim checkpoint' in done.stdout
    assert 'stage4: layer4, 64 channels, stride 32' in done.stdout
    done = _tool('verify', config, path, '--json')
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])['kind'] == 'slim'
    done = _tool('merge', config, path, tmp_path / 'full.pth')
    assert done.returncode == 0 and 'full checkpoint' in done.stdout
    done = _tool('merge', config, path, tmp_path / 'full.pth')
    assert done.returncode == 1 and 'nothing was written' in done.stderr
    assert 'Traceback' not in done.stderr
    done = _tool('verify', config, tmp_path / 'none.pth')
    assert done.returncode == 1 and 'none.pth can not be found' in done.stderr


def test_what_trains_inside_is_told_by_group(file):
    model = build_model(prompted_config(file, trainable=[r'layer4\.1\.conv2\..*']))
    groups = prompt_parameters(model)
    assert {*groups['backbone']} == {
        'backbone.backbone.bn1.weight', 'backbone.backbone.bn1.bias',
        'backbone.backbone.layer4.1.conv2.weight'}
    assert {*groups['prompts']} == {
        name for name, _ in model.named_parameters() if name.startswith('backbone.prompts.')}
    named = dict(model.named_parameters())
    assert all(param is named[name] for group in groups.values() for name, param in group.items())
    # A backbone alone, and a model that has none.
    alone = prompt_parameters(model.backbone)
    assert 'backbone.bn1.weight' in alone['backbone'] and alone['prompts']
    assert prompt_parameters(model.head) == dict(prompts={}, backbone={})
