"""Noise batches: what each kind of model gets instead of its data."""
import numpy as np
import pytest
import torch
from mmdet.models import FasterRCNN, SoftTeacher
from mmengine.config import Config

from mmprotune.testing.noise_batch import noise_batch, noise_item


def item(scope='mmdet', pipeline=(), **model):
    cfg = Config(dict(default_scope=scope, model=model, train_dataloader=dict(
        dataset=dict(type='Repeat', dataset=dict(pipeline=list(pipeline))))))
    return noise_item(cfg, 64, np.random.default_rng(0))


def test_a_video_is_two_frames_of_the_same_objects():
    found = item(data_preprocessor=dict(type='TrackDataPreprocessor'), num_classes=3)
    assert found['inputs'].shape == (2, 3, 64, 64)
    sample = found['data_samples']
    assert sample.key_frames_inds == [0] and sample.ref_frames_inds == [1]
    objects = [s.gt_instances.instances_ids.tolist() for s in sample.video_data_samples]
    assert objects == [[0, 1], [0, 1]]
    images = item(data_preprocessor=dict(type='TrackDataPreprocessor', use_det_processor=True))
    assert images['inputs'].shape == (3, 64, 64)


def test_a_semi_supervised_model_gets_every_branch():
    found = item(data_preprocessor=dict(
        type='MultiBranchDataPreprocessor', data_preprocessor=dict(pad_mask=True)))
    assert list(found['inputs']) == list(found['data_samples']) == ['sup', 'unsup_teacher',
                                                                    'unsup_student']
    for sample in found['data_samples'].values():
        assert sample.homography_matrix.dtype == np.float32
        assert len(sample.gt_instances.masks) == 2


def test_annotations_are_those_that_the_model_learns():
    plain = item()['data_samples']
    assert 'masks' not in plain.gt_instances and 'gt_sem_seg' not in plain
    assert plain.gt_instances.labels.tolist() == [0, 0]  # one class where the config names none
    rich = item(data_preprocessor=dict(pad_seg=True), roi_head=dict(mask_head=dict(num_classes=5)))
    assert len(rich['data_samples'].gt_instances.masks) == 2
    assert rich['data_samples'].gt_sem_seg.sem_seg.shape == (1, 64, 64)
    person = item(data_preprocessor=dict(type='ReIDDataPreprocessor'))
    assert person['inputs'].shape == (3, 128, 64) and 'gt_label' in person['data_samples']
    edges = item('mmseg', decode_head=dict(type='PIDHead', num_classes=4))['data_samples']
    assert edges.gt_edge_map.data.max() == 1 and edges.gt_sem_seg.data.max() == 3
    depth = item('mmseg', type='DepthEstimator')['data_samples'].gt_depth_map.data
    assert depth.dtype == torch.float32 and depth.min() >= 1


@pytest.mark.parametrize('transform, shapes', [
    (dict(type='MultiView', num_views=2), [64] * 2),
    (dict(type='MultiView', num_views=[2, 3]), [64] * 5),
    (dict(type='RandomResizedCropAndInterpolationWithTwoPic', size=224, second_size=112), [64, 32]),
    (dict(type='RandomResizedCropAndInterpolationWithTwoPic', size=224), [64, 64]),
])
def test_views_are_as_many_as_the_pipeline_makes(transform, shapes):
    views = item('mmpretrain', [transform])['inputs']
    assert [view.shape for view in views] == [(3, s, s) for s in shapes]


def test_masks_are_drawn_by_the_pipeline_and_items_stacked():
    generator = dict(type='SimMIMMaskGenerator', input_size=64, mask_patch_size=32,
                     model_patch_size=4, mask_ratio=0.5)
    assert item('mmpretrain', [generator])['data_samples'].mask.shape == (16, 16)
    cfg = Config(dict(default_scope='mmpretrain', model=dict(type='ImageClassifier')))
    batch = noise_batch(cfg, 32, 2, np.random.default_rng(0))
    assert batch['inputs'].shape == (2, 3, 32, 32) and len(batch['data_samples']) == 2
    with pytest.raises(KeyError, match="must be one of mmdet, mmseg, mmpretrain, got 'mmpose'"):
        item('mmpose')


@pytest.mark.parametrize('model', [
    dict(type=FasterRCNN, data_preprocessor=dict(pad_mask=True)),
    dict(type=SoftTeacher, data_preprocessor=dict(data_preprocessor=dict(pad_mask=True)))])
def test_configs_with_classes_for_types(model):
    """They need no scope; masks are asked for by whatever preprocessor is inside."""
    cfg = Config(dict(model=dict(model, head=dict(num_classes=3))))
    item = noise_item(cfg, 32, np.random.default_rng(0))
    instances = item['data_samples'].gt_instances
    assert item['inputs'].shape == (3, 32, 32)
    assert len(instances.masks) == len(instances.bboxes) == 2 and instances.labels.max() < 3


def test_another_librarys_config():
    with pytest.raises(KeyError, match='must be one of mmdet, mmseg, mmpretrain'):
        noise_item(Config(dict(default_scope='mmpose', model=dict())), 32, np.random.default_rng(0))
