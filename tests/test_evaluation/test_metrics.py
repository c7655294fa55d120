from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator

from mmprotune.errors import OptionError
from mmprotune.evaluation import (
    CalibrationError,
    ShotAccuracy,
    calibration_error,
    mean_corruption_error,
    shot_accuracy,
)
from mmprotune.evaluation.shot_accuracy import count_classes

from ..classification import classification_scope, draw_folder


def samples(scores, labels) -> list[dict]:
    scores = torch.as_tensor(scores, dtype=torch.float)
    return [dict(pred_score=score, pred_label=score.argmax(-1, keepdim=True),
                 gt_label=torch.tensor([label])) for score, label in zip(scores, labels)]


# --- shots ------------------------------------------------------------------------------------


def test_shot_accuracy_by_hand():
    """Classes of 500, 101, 100, 20, 19 and 3 training images; 2, 4, 1, 2, 1 and 0 test images."""
    target = [0, 0, 1, 1, 1, 1, 2, 3, 3, 4]
    guess_ = [0, 1, 1, 1, 1, 0, 2, 3, 0, 5]
    result = shot_accuracy(guess_, target, [500, 101, 100, 20, 19, 3])
    # Classes 0 and 1 are right in 1/2 and 3/4, 2 and 3 in 1 and 1/2, 4 never; 5 is not tested.
    assert result == dict(many=62.5, medium=75., few=0., mean=pytest.approx(55.))


def test_groups_without_test_images_are_left_out():
    assert shot_accuracy([0, 0], [0, 1], [50, 50]) == dict(medium=50., mean=50.)
    assert shot_accuracy([0], [0], [50], few=60, many=60) == dict(few=100., mean=100.)


def test_shot_accuracy_is_mmpretrains_recall(tmp_path):
    """With one group, it is the macro recall of MMPretrain's metric."""
    from mmpretrain.evaluation import SingleLabelMetric
    rng = np.random.default_rng(0)
    target, predicted = rng.integers(0, 7, 90), rng.integers(0, 7, 90)
    _, recall, _, _ = SingleLabelMetric.calculate(predicted, target, num_classes=7)
    result = shot_accuracy(predicted, target, [500] * 7)
    assert result['many'] == pytest.approx(recall.item(), abs=1e-4)


def test_metric_counts_the_training_set(tmp_path):
    train = dict(
        type='CustomDataset', data_root=str(draw_folder(tmp_path, (9, 4, 2, 1))),
        pipeline=[dict(type='LoadImageFromFile')])
    long_tailed = dict(type='mmprotune.LongTailedDataset', factor=1, dataset=train)
    with classification_scope():
        assert count_classes(train) == [9, 4, 2, 1]
        assert count_classes(long_tailed) == [1, 1, 1, 1]
        metric = dict(type='mmprotune.ShotAccuracy', train_dataset=train, few=3, many=5)
        evaluator = Evaluator([metric])
    evaluator.process(samples(np.eye(4)[[0, 1, 1, 3]], [0, 1, 2, 3]))
    assert evaluator.evaluate(4) == {
        'shot/many': 100., 'shot/medium': 100., 'shot/few': 50., 'shot/mean': 75.}


def test_wrong_shots():
    with pytest.raises(OptionError, match='either class_counts or train_dataset'):
        ShotAccuracy()
    with pytest.raises(OptionError, match='0 < few <= many, got few=30, many=20'):
        ShotAccuracy([1, 2], few=30, many=20)
    metric = ShotAccuracy([10, 20])
    metric.process(None, samples(np.eye(3), [0, 1, 2]))
    with pytest.raises(OptionError, match='label 2 has no training count: class_counts has 2'):
        metric.evaluate(3)


# --- calibration ------------------------------------------------------------------------------


def test_calibration_error_by_hand():
    """Two bins: confidences 0.3 (wrong) and 0.5 (right); 0.9 (right) and 0.7 (wrong)."""
    confidence = torch.tensor([0.3, 0.5, 0.9, 0.7])
    correct = torch.tensor([0, 1, 1, 0])
    # |1 - 0.8| / 4 + |1 - 1.6| / 4
    assert calibration_error(confidence, correct, bins=2) == pytest.approx(20.)
    # One bin: |2 - 2.4| / 4.
    assert calibration_error(confidence, correct, bins=1) == pytest.approx(10.)
    assert calibration_error(torch.ones(3), torch.ones(3)) == 0
    assert calibration_error(torch.ones(4), torch.tensor([1, 1, 0, 0])) == pytest.approx(50.)


@pytest.mark.parametrize('bins', [5, 15])
def test_calibration_error_is_torchmetrics(bins):
    classification = pytest.importorskip('torchmetrics.classification')
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(400, 6, generator=generator) * 2).softmax(-1)
    labels = torch.randint(0, 6, (400, ), generator=generator)
    theirs = classification.MulticlassCalibrationError(num_classes=6, n_bins=bins)(scores, labels)
    metric = CalibrationError(bins)
    metric.process(None, samples(scores, labels))
    ours = metric.evaluate(400)
    assert ours['calibration/ece'] == pytest.approx(100 * theirs.item(), abs=1e-3)
    assert ours['calibration/confidence'] == pytest.approx(
        100 * scores.max(-1).values.mean().item(), abs=1e-3)


@pytest.mark.parametrize(('confidence', 'bins', 'error', 'message'), [
    ([0.5], 0, OptionError, 'bins must be at least 1'),
    ([], 5, ValueError, 'at least one confidence'),
    ([1.2], 5, ValueError, r'confidences in \[0, 1\]'),
    ([-0.1], 5, ValueError, r'confidences in \[0, 1\]'),
])
def test_wrong_confidences(confidence, bins, error, message):
    confidence = torch.tensor(confidence)
    with pytest.raises(error, match=message):
        calibration_error(confidence, torch.ones_like(confidence), bins)


# --- corruption -------------------------------------------------------------------------------


def test_mean_corruption_error_by_hand():
    errors = dict(fog={1: 10., 3: 30.}, snow={1: 20., 3: 60.})
    assert mean_corruption_error(errors) == (30., dict(fog=20., snow=40.))
    reference = dict(fog={1: 20., 3: 60., 5: 1.}, snow={1: 40., 3: 40.}, frost={1: 1.})
    # 40 / 80 and 80 / 80: sums are divided, not averaged after dividing each.
    assert mean_corruption_error(errors, reference) == (75., dict(fog=50., snow=100.))
    assert mean_corruption_error(errors, errors)[0] == 100.


@pytest.mark.parametrize(('errors', 'reference', 'message'), [
    ({}, None, 'no errors'),
    (dict(fog={}), None, 'no errors'),
    (dict(fog={1: 1.}, snow={2: 1.}), None, 'different severities'),
    (dict(fog={1: 1.}), dict(snow={1: 1.}), "no error for fog at the severities \\[1\\]: 'fog'"),
    (dict(fog={1: 1.}), dict(fog={2: 1.}), 'no error for fog'),
    (dict(fog={1: 1.}), dict(fog={1: 0.}), 'makes no errors on fog'),
])
def test_wrong_errors(errors, reference, message):
    with pytest.raises(ValueError, match=message):
        mean_corruption_error(errors, reference)
