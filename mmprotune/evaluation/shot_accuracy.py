"""Accuracy on the many-, medium- and few-shot classes of a long-tailed training set."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from mmprotune.errors import OptionError
from mmprotune.registry import DATASETS, METRICS


def shot_accuracy(predicted: Sequence[int], target: Sequence[int], class_counts: Sequence[int],
                  few: int = 20, many: int = 100) -> dict[str, float]:
    """Mean accuracy over the classes of each group, in percent.

    Args:
        predicted (Sequence[int]): Predicted labels, (N, ).
        target (Sequence[int]): True labels, (N, ).
        class_counts (Sequence[int]): Training images of each class.
        few (int): Classes with fewer training images are few-shot. Defaults to 20.
        many (int): Classes with more training images are many-shot; the rest is medium-shot.
            Defaults to 100.

    Returns:
        dict[str, float]: 'many', 'medium' and 'few' as far as the test set has images of such
        classes, and 'mean' over all its classes.
    """
    predicted, target, counts = (np.asarray(a) for a in (predicted, target, class_counts))
    groups = dict(
        many=counts > many, medium=(counts >= few) & (counts <= many), few=counts < few,
        mean=counts >= 0)
    tested = np.bincount(target, minlength=len(counts))
    correct = np.bincount(target[predicted == target], minlength=len(counts))
    result = {}
    for name, members in groups.items():
        members = members & (tested > 0)
        if members.any():
            result[name] = float((correct[members] / tested[members]).mean() * 100)
    return result


@METRICS.register_module()
class ShotAccuracy(BaseMetric):
    """Many-, medium- and few-shot accuracy, with the thresholds of Liu et al.,
    https://arxiv.org/abs/1904.05160.

    Args:
        class_counts (Sequence[int], optional): Training images of each class.
        train_dataset (dict, optional): Or the config of the training set, to count them.
        few (int): Fewer training images: few-shot. Defaults to 20.
        many (int): More training images: many-shot; the rest is medium-shot. Defaults to 100.
        collect_device (str): See :class:`mmengine.evaluator.BaseMetric`. Defaults to 'cpu'.
        prefix (str, optional): Likewise. Defaults to None: 'shot'.

    Raises:
        OptionError: Not exactly one of ``class_counts`` and ``train_dataset`` is given, the
            thresholds are out of order, or a label has no count.
    """
    default_prefix = 'shot'

    def __init__(self,
                 class_counts: Sequence[int] | None = None,
                 train_dataset: dict | None = None,
                 few: int = 20,
                 many: int = 100,
                 collect_device: str = 'cpu',
                 prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if (class_counts is None) == (train_dataset is None):
            raise OptionError('give either class_counts or train_dataset')
        if not 0 < few <= many:
            raise OptionError(f'expected 0 < few <= many, got few={few}, many={many}')
        if class_counts is None:
            class_counts = count_classes(train_dataset)
            print_log(f'training images of each class: {class_counts}', logger='current')
        self.class_counts = list(class_counts)
        self.few = few
        self.many = many

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Keeps the predicted and the true label of each sample."""
        for sample in data_samples:
            self.results.append((int(sample['pred_label']), int(sample['gt_label'])))

    def compute_metrics(self, results: list) -> dict:
        """dict: See :func:`shot_accuracy`."""
        predicted, target = np.asarray(results).T
        if target.max() >= len(self.class_counts):
            raise OptionError(f'label {target.max()} has no training count: class_counts has '
                              f'{len(self.class_counts)} classes')
        return shot_accuracy(predicted, target, self.class_counts, self.few, self.many)


def count_classes(dataset: dict) -> list[int]:
    """Images of each class of a dataset.

    Args:
        dataset (dict): Its config.

    Returns:
        list[int]: Number of images, by label.
    """
    from mmprotune.datasets.long_tailed import members_by_class
    dataset = DATASETS.build(dict(dataset, pipeline=[]) if 'pipeline' in dataset else dataset)
    dataset.full_init()
    if hasattr(dataset, 'class_counts'):
        return list(dataset.class_counts)
    return [len(members) for members in members_by_class(dataset)]
