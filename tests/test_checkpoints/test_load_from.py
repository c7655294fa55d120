"""Prompting a whole model's checkpoint: what the run saves works by itself."""
import os
from pathlib import Path

import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.runner import Runner

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from mmprotune.config_nodes import prompted_nodes
from mmprotune.engine import training
from mmprotune.engine.hooks import PromptCheckpointHook
from mmprotune.errors import CheckpointError, FingerprintMismatch
from tests.conftest import RESNET18, build
from tests.detection import detector_cfg, draw_coco, run
from tests.test_tools.conftest import load_tool

prompt_checkpoint = load_tool('prompt_checkpoint.py')


def _prompted(file, **options):
    return {
        'type': 'mmprotune.PromptedBackbone',
        'backbone': dict(RESNET18, init_cfg=dict(type='Pretrained', checkpoint=file)), **options}


def _copy(cfg):
    return Config(cfg._cfg_dict.to_dict())


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    draw_coco(folder)
    return folder


@pytest.fixture(scope='module')
def detector(data, resnet18_file, tmp_path_factory):
    """A file of a whole stock detector, whose backbone is nobody else's."""
    cfg = detector_cfg(RESNET18, data, tmp_path_factory.mktemp('stock'))
    model = build(cfg.model, seed=7)
    model.init_weights()
    path = tmp_path_factory.mktemp('detector') / 'detector.pth'
    torch.save(dict(meta=dict(epoch=12, iter=100), state_dict=model.state_dict()), path)
    return str(path)


def _cfg(backbone, data, work_dir, load_from, epochs=1):
    return detector_cfg(backbone, data, work_dir, **{
        'load_from': load_from, 'train_cfg.max_epochs': epochs,
        'train_dataloader.dataset.indices': 2,
        'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None})


def _saved(work_dir) -> str:
    """The config file that the Runner wrote."""
    return str(next(Path(work_dir).glob('*.py')))


@pytest.fixture(scope='module')
def trained(data, detector, resnet18_file, tmp_path_factory):
    """The user's config, the one that the run saved, and its slim checkpoint."""
    work_dir = tmp_path_factory.mktemp('run')
    cfg = _cfg(_prompted(resnet18_file), data, work_dir, os.path.relpath(detector))
    run(cfg)
    return cfg, _saved(work_dir), str(work_dir / 'epoch_1.pth')


def test_the_saved_config_says_what_the_backbone_came_from(trained, detector):
    _, saved, slim = trained
    content = torch.load(slim, weights_only=True)
    for text in (Path(saved).read_text(), content['meta']['cfg'],
                 content['message_hub']['runtime_info']['cfg']):
        cfg = Config.fromstring(text, file_format='.py')
        assert cfg.model.backbone.frozen_from == detector
    assert content['meta']['mmprotune']['backbones']['backbone']['frozen_from'] == detector
    assert checkpoint.inspect(slim)['backbones']['backbone']['frozen_from'] == detector
    weights = torch.load(detector)['state_dict']
    assert f'frozen_from: {detector}' in prompt_checkpoint._text(checkpoint.inspect(slim))
    model = build_model(saved)
    checkpoint.load(model, slim)
    assert torch.equal(model.backbone.backbone.conv1.weight, weights['backbone.conv1.weight'])


def test_every_verb_works_with_the_saved_config(trained, tmp_path):
    _, saved, slim = trained
    assert checkpoint.verify(slim, saved)['kind'] == 'slim'
    full, again = tmp_path / 'full.pth', tmp_path / 'slim.pth'
    assert checkpoint.merge(slim, saved, full)['kind'] == 'full'
    assert checkpoint.extract(full, saved, again)['kind'] == 'slim'
    a, b = (torch.load(p, weights_only=True)['state_dict'] for p in (slim, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_inferencers_need_the_slim_file_alone(trained, data):
    _, saved, slim = trained
    image = str(data / '0.png')
    first = DetInferencer(weights=slim, device='cpu', show_progress=False)
    second = init_detector(saved, slim, device='cpu')
    found = [first(image, return_datasamples=True)['predictions'][0].pred_instances.bboxes,
             inference_detector(second, image).pred_instances.bboxes]
    assert len(found[0]) and torch.equal(*found)


def test_the_runner_tests_and_resumes_with_the_saved_config(trained, tmp_path):
    _, saved, slim = trained
    cfg = Config.fromfile(saved)
    cfg.merge_from_dict(dict(load_from=slim, work_dir=str(tmp_path / 'test')))
    run(cfg, train=False)
    cfg = Config.fromfile(saved)
    cfg.merge_from_dict({'work_dir': str(tmp_path / 'resumed'), 'train_cfg.max_epochs': 2})
    training.set_resume(cfg, slim)
    assert run(cfg).epoch == 2
    assert checkpoint.verify(tmp_path / 'resumed/epoch_2.pth', saved)['epoch'] == 2


def test_the_same_command_resumes(trained, tmp_path):
    """With the user's own config, whose load_from gives way to the newest checkpoint."""
    cfg, saved, slim = trained
    cfg = _copy(cfg)
    cfg.train_cfg.max_epochs = 2
    training.set_resume(cfg, 'auto')
    assert (cfg.load_from, cfg.model.backbone.frozen_from) == (
        slim, Config.fromfile(saved).model.backbone.frozen_from)
    cfg.work_dir = str(tmp_path)
    assert run(cfg).epoch == 2


def test_the_file_that_is_needed_is_named(trained, detector, tmp_path):
    cfg, _, slim = trained
    needed = f'trained on the backbone of {detector}: set model.backbone.frozen_from={detector}$'
    with pytest.raises(FingerprintMismatch, match=needed):
        checkpoint.verify(slim, cfg)
    tested = _copy(cfg)
    tested.merge_from_dict(dict(load_from=slim, work_dir=str(tmp_path)))
    runner = Runner.from_cfg(tested)
    hook = next(hook for hook in runner.hooks if isinstance(hook, PromptCheckpointHook))
    for hook.strict in (True, False):
        with pytest.raises(FingerprintMismatch, match=f'^{slim}: .*{needed}'):
            runner.load_or_resume()


def test_a_file_that_has_changed_since_is_named(trained, detector, tmp_path):
    cfg, saved, slim = trained
    content = torch.load(detector)
    content['state_dict']['backbone.conv1.weight'].add_(1)
    other = Config.fromfile(saved)
    other.model.backbone.frozen_from = str(tmp_path / 'other.pth')
    torch.save(content, other.model.backbone.frozen_from)
    altered = torch.load(slim, weights_only=True)
    altered['meta']['mmprotune']['backbones']['backbone']['frozen_from'] = \
        other.model.backbone.frozen_from
    torch.save(altered, tmp_path / 'slim.pth')
    with pytest.raises(FingerprintMismatch, match='the file holds other weights than then'):
        checkpoint.verify(tmp_path / 'slim.pth', other)


@pytest.mark.parametrize('meta', [None, 3, {}, dict(mmprotune=3), dict(mmprotune=dict()),
                                  dict(mmprotune=dict(backbones=dict(backbone=dict())))])
def test_a_file_that_does_not_say_is_still_refused(trained, tmp_path, meta):
    cfg, _, slim = trained
    content = dict(torch.load(slim, weights_only=True), meta=meta)
    if meta is None:
        del content['meta']
    torch.save(content, tmp_path / 'slim.pth')
    with pytest.raises(FingerprintMismatch, match='check backbone.init_cfg and frozen_from$'):
        checkpoint.load(build_model(cfg), tmp_path / 'slim.pth')


def test_what_the_pretrained_file_did_not_fill_still_trains(data, detector, resnet18_file,
                                                            tmp_path):
    """load_from fills it as well; it was going to train, and is in the slim file."""
    weights = torch.load(resnet18_file)
    del weights['bn1.weight'], weights['bn1.bias']
    torch.save(weights, tmp_path / 'less.pth')
    cfg = _cfg(_prompted(str(tmp_path / 'less.pth')), data, tmp_path / 'run', detector)
    run(cfg)
    slim, saved = str(tmp_path / 'run/epoch_1.pth'), _saved(tmp_path / 'run')
    assert 'backbone.backbone.bn1.weight' in torch.load(slim, weights_only=True)['state_dict']
    assert checkpoint.verify(slim, saved)['kind'] == 'slim'
    training.set_resume(cfg, slim)
    cfg.train_cfg.max_epochs = 2
    assert run(cfg).epoch == 2
    with pytest.raises(CheckpointError, match=r"trainable=\['bn1\\\\\.weight'"):
        checkpoint.verify(slim, _cfg(_prompted(resnet18_file), data, tmp_path, None))


def test_a_prompted_checkpoint_with_another_backbone(trained, data, resnet18_file, tmp_path):
    """A full file fills the backbone as well: what it was is in the file's own keys."""
    _, saved, slim = trained
    full = str(tmp_path / 'full.pth')
    checkpoint.merge(slim, saved, full)
    cfg = _cfg(_prompted(resnet18_file), data, tmp_path / 'run', full)
    run(cfg)
    assert checkpoint.verify(tmp_path / 'run/epoch_1.pth', _saved(tmp_path / 'run'))


def test_nothing_is_noted_where_load_from_brings_no_backbone(trained, data, tmp_path):
    _, saved, slim = trained
    cfg = Config.fromfile(saved)
    cfg.merge_from_dict(dict(load_from=slim, work_dir=str(tmp_path)))
    before = cfg.model.backbone.to_dict()
    run(cfg)
    assert Config.fromfile(_saved(tmp_path)).model.backbone.to_dict() == before


def test_a_file_that_would_fill_it_otherwise_stops_the_run(data, detector, resnet18_file, tmp_path):
    """Two backbones in one file: load_from takes one, and by itself the wrapper the other."""
    content = torch.load(detector)
    content['state_dict'].update(torch.load(resnet18_file))
    torch.save(content, tmp_path / 'two.pth')
    cfg = _cfg(_prompted(resnet18_file), data, tmp_path / 'run', str(tmp_path / 'two.pth'))
    with pytest.raises(FingerprintMismatch, match='slim checkpoints of this run could not be used'):
        run(cfg)


# --- pre-trained files where inferencers delete them -----------------------------------------


def test_an_outer_init_cfg_is_saved_where_it_stays(data, resnet18_file, tmp_path):
    outer = {'type': 'mmprotune.PromptedBackbone', 'backbone': dict(RESNET18),
             'init_cfg': dict(type='Pretrained', checkpoint=resnet18_file)}
    run(_cfg(outer, data, tmp_path, None))
    saved = Config.fromfile(_saved(tmp_path))
    assert 'init_cfg' not in saved.model.backbone
    assert saved.model.backbone.backbone.init_cfg.checkpoint == resnet18_file
    slim = str(tmp_path / 'epoch_1.pth')
    init_detector(saved, slim, device='cpu')
    DetInferencer(weights=slim, device='cpu', show_progress=False)
    log = next(tmp_path.glob('*/*.log')).read_text()
    moved = 'model.backbone.init_cfg to model.backbone.backbone.init_cfg'
    assert log.count(moved) == 1


def test_files_move_to_the_backbone_they_are_of():
    from mmprotune.config_nodes import pull_in_files

    def prompted(**inner):
        return dict(type='PromptedBackbone', backbone=dict(type='A', **inner))

    file = dict(type='Pretrained', checkpoint='a.pth')
    segmentor = dict(type='EncoderDecoder', pretrained='a.pth', backbone=prompted())
    assert pull_in_files(segmentor) == ['model.pretrained to model.backbone.backbone.init_cfg']
    assert segmentor == dict(type='EncoderDecoder', backbone=prompted(init_cfg=file))
    assert pull_in_files(segmentor) == []
    nested = dict(detector=dict(backbone=dict(prompted(pretrained='own.pth'), init_cfg=file)))
    assert pull_in_files(nested) == [
        'model.detector.backbone.init_cfg to model.detector.backbone.backbone.init_cfg']
    assert nested == dict(detector=dict(backbone=prompted(pretrained='own.pth')))
    # Of several, the one that PromptedBackbone takes.
    drawn = dict(prompted(init_cfg=dict(type='Normal')), init_cfg=file)
    assert pull_in_files(drawn) and drawn == prompted(init_cfg=file)
    both = dict(prompted(), init_cfg=file, pretrained='b.pth')
    assert pull_in_files(both) and both == dict(prompted(), pretrained='b.pth')
    stock = dict(pretrained='a.pth', backbone=dict(type='A', init_cfg=file))
    assert pull_in_files(stock) == [] and pull_in_files(None) == []
    assert stock == dict(pretrained='a.pth', backbone=dict(type='A', init_cfg=file))


def test_prompted_backbones_are_found_wherever_they_are():
    from mmprotune import PromptedBackbone
    model = dict(a=dict(type=PromptedBackbone), b=[dict(c=dict(type='mmprotune.PromptedBackbone'))],
                 d=dict(type='ResNet'))
    assert [path for path, _ in prompted_nodes(model)] == ['a', 'b.0.c']
