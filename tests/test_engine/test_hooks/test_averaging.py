"""Averages of models in training: EMA, and the teacher of a semi-supervised detector."""
from __future__ import annotations

import copy

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseAveragedModel

from mmprotune.checkpoint import read
from mmprotune.errors import FrozenTensorsChanged
from tests.conftest import RESNET18
from tests.detection import detector_cfg, draw_coco, run

HOOKS = ('PromptCheckpointHook', 'FreezeGuardHook', 'PromptStatsHook', 'NonFiniteGuardHook')
MOMENTUM = 0.1  # one of those at which averaging float32 with itself rounds


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    draw_coco(folder)
    return folder


def weights(part) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in part.frozen_tensors().items()}


def moved(part, before: dict) -> list[str]:
    now = part.frozen_tensors()
    assert now.keys() == before.keys() and before
    return [name for name in now if not torch.equal(now[name], before[name])]


# --- semi-supervised --------------------------------------------------------------------------


def soft_teacher(backbone: dict, data, work_dir):
    """mmdet's SoftTeacher around the tiny detector, with its own hook, sampler and transforms."""
    cfg = detector_cfg(backbone, data, work_dir)
    detector = cfg.model.to_dict()
    detector['data_preprocessor'].pop('batch_augments', None)
    cfg.model = dict(
        type='SoftTeacher', detector=detector,
        data_preprocessor=dict(
            type='MultiBranchDataPreprocessor', data_preprocessor=detector['data_preprocessor']),
        semi_train_cfg=dict(
            freeze_teacher=True, sup_weight=1., unsup_weight=1., cls_pseudo_thr=0.,
            pseudo_label_initial_score_thr=0., rpn_pseudo_thr=0., reg_pseudo_thr=1.,
            jitter_times=2, jitter_scale=0.06, min_pseudo_bbox_wh=(1e-2, 1e-2)),
        semi_test_cfg=dict(predict_on='teacher'))
    branches = ['sup', 'unsup_teacher', 'unsup_student']
    resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
    flip = dict(type='RandomFlip', prob=0.5)
    pack = dict(type='PackDetInputs', meta_keys=(
        'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction',
        'homography_matrix'))
    labelled, unlabelled = (cfg.train_dataloader.dataset.to_dict() for _ in range(2))
    labelled['pipeline'] = [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), resize, flip,
        dict(type='MultiBranch', branch_field=branches, sup=dict(type='PackDetInputs'))]
    unlabelled['pipeline'] = [
        dict(type='LoadImageFromFile'), dict(type='LoadEmptyAnnotations'),
        dict(type='MultiBranch', branch_field=branches, unsup_teacher=[resize, pack],
             unsup_student=[resize, flip, pack])]
    for dataset in (labelled, unlabelled):
        dataset['filter_cfg'] = dict(filter_empty_gt=False)
    cfg.train_dataloader = dict(
        batch_size=2, num_workers=0, persistent_workers=False,
        sampler=dict(type='GroupMultiSourceSampler', batch_size=2, source_ratio=[1, 1]),
        dataset=dict(type='ConcatDataset', datasets=[labelled, unlabelled]))
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=10)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=3)
    cfg.log_processor = dict(by_epoch=False)
    cfg.custom_hooks = [dict(type='MeanTeacherHook', momentum=MOMENTUM),
                        *(dict(type=f'mmprotune.{name}') for name in HOOKS)]
    return cfg


@pytest.mark.parametrize(('kind', 'skip_buffer'), [
    ('SoftTeacher', True), ('SemiBaseDetector', False)])
def test_a_semi_supervised_detector_trains(prompted_cfg, data, tmp_path, kind, skip_buffer):
    cfg = soft_teacher(prompted_cfg, data, tmp_path)
    cfg.model.type = kind
    cfg.custom_hooks[0].skip_buffer = skip_buffer
    cfg.custom_hooks[3].interval = 1
    model = run(cfg).model
    # The base class predicts in eval mode, and leaves the teacher in it.
    assert model.teacher.backbone.training == (kind == 'SoftTeacher')
    student, teacher = model.student.backbone, model.teacher.backbone
    stock = torch.load(prompted_cfg['backbone']['init_cfg']['checkpoint'], weights_only=True)
    for part in (student, teacher):
        assert moved(part, {name: stock[name] for name in part.frozen_tensors()}) == []
    # The prompts of both moved, the teacher's behind the student's.
    for stage, block in student.prompts.items():
        ours, theirs = block.expand.weight, teacher.prompts[stage].expand.weight
        assert 0 < theirs.abs().sum() < ours.abs().sum()
    assert not torch.equal(model.student.roi_head.bbox_head.fc_cls.weight,
                           model.teacher.roi_head.bbox_head.fc_cls.weight)
    content = read(tmp_path / 'iter_3.pth')
    assert content['meta']['mmprotune']['backbones'].keys() == {
        'student.backbone', 'teacher.backbone'}
    assert not any('.backbone.backbone.' in name for name in content['state_dict'])


def test_a_teacher_drawn_at_random_starts_as_its_student(prompted_cfg, data, tmp_path):
    cfg = soft_teacher(dict(prompted_cfg, backbone=RESNET18, freeze='all'), data, tmp_path)
    model = run(cfg).model
    assert moved(model.teacher.backbone, weights(model.student.backbone)) == []
    assert model.teacher.backbone.own_fingerprint == model.student.backbone.own_fingerprint


# --- EMA --------------------------------------------------------------------------------------


@pytest.fixture
def ema_cfg(prompted_cfg, data, tmp_path):
    cfg = detector_cfg(prompted_cfg, data, tmp_path, **{'train_cfg.max_epochs': 2})
    # Validation swaps the average in and out.
    cfg.train_cfg.val_interval = 1
    cfg.custom_hooks += [dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=MOMENTUM, gamma=3,
                              update_buffers=False, priority=49)]
    return cfg


@pytest.mark.parametrize('update_buffers', [True, False])
def test_the_average_of_frozen_weights_is_them(ema_cfg, update_buffers):
    ema_cfg.custom_hooks[-1].update_buffers = update_buffers
    runner = run(ema_cfg)
    hook = next(hook for hook in runner.hooks if isinstance(hook, EMAHook))
    model, average = runner.model, hook.ema_model.module
    stock = weights(model.backbone)
    assert moved(average.backbone, stock) == []
    # What trains is averaged.
    block, smooth = (m.backbone.prompts['stage1'].expand.weight for m in (model, average))
    assert smooth.abs().sum() > 0 and not torch.equal(block, smooth)


def test_the_average_has_the_file_of_the_whole_model(ema_cfg, tmp_path):
    """Which is loaded after the average was made."""
    other = copy.deepcopy(ema_cfg)
    other.custom_hooks.pop()
    other.train_cfg.max_epochs = 1
    other.work_dir = str(tmp_path / 'other')
    state = run(other).model
    state = {**state.state_dict(), **{
        f'backbone.backbone.{name}': tensor * 1.5 if tensor.is_floating_point() else tensor
        for name, tensor in state.backbone.frozen_tensors().items()}}
    state.pop('backbone.frozen_fingerprint')
    torch.save(dict(state_dict=state), tmp_path / 'whole.pth')
    ema_cfg.load_from = str(tmp_path / 'whole.pth')
    ema_cfg.train_cfg.max_epochs = 1
    runner = run(ema_cfg)
    average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
    assert torch.equal(average.backbone.backbone.conv1.weight,
                       state['backbone.backbone.conv1.weight'])
    assert moved(average.backbone, weights(runner.model.backbone)) == []


def test_an_average_that_moved_is_told(ema_cfg, monkeypatch):
    original = BaseAveragedModel.update_parameters

    def meddling(self, model):
        original(self, model)
        self.module.backbone.backbone.conv1.weight.data.mul_(1.01)

    monkeypatch.setattr(BaseAveragedModel, 'update_parameters', meddling)
    ema_cfg.train_cfg.update(max_epochs=1, val_interval=10)
    with pytest.raises(FrozenTensorsChanged,
                       match=r'moved in EMAHook\.ema_model: backbone\.backbone\.conv1\.weight'):
        run(ema_cfg)
