"""Expected calibration error."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.evaluator import BaseMetric
from torch import Tensor

from mmprotune.errors import OptionError
from mmprotune.registry import METRICS


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    r"""Expected calibration error over bins of equal width, in percent.

    .. math:: ECE = \sum_b \frac{n_b}{N} |acc_b - conf_b|

    Guo et al., https://arxiv.org/abs/1706.04599.

    Args:
        confidence (Tensor): Probability of the predicted class, shape (N, ), in [0, 1].
        correct (Tensor): Whether the prediction is right, shape (N, ).
        bins (int): Number of bins; each includes its upper edge. Defaults to 15.

    Returns:
        float: Percent.

    Raises:
        OptionError: Fewer than one bin.
        ValueError: No samples, or a confidence outside [0, 1].
    """
    if bins < 1:
        raise OptionError(f'bins must be at least 1, got {bins}')
    if not len(confidence) or confidence.min() < 0 or confidence.max() > 1 + 1e-6:
        raise ValueError('expected confidences in [0, 1], got '
                         f'{[confidence.min().item(), confidence.max().item()]}'
                         if len(confidence) else 'expected at least one confidence')
    confidence, correct = confidence.double().contiguous(), correct.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    index = (torch.bucketize(confidence, edges) - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.double).index_add_(0, index, correct - confidence)
    return float(gap.abs().sum() / len(confidence) * 100)


@METRICS.register_module()
class CalibrationError(BaseMetric):
    """How far the classifier's confidence is from its accuracy, in percent.

    Args:
        bins (int): See :func:`calibration_error`. Defaults to 15.
        collect_device (str): See :class:`mmengine.evaluator.BaseMetric`. Defaults to 'cpu'.
        prefix (str, optional): Likewise. Defaults to None: 'calibration'.
    """
    default_prefix = 'calibration'

    def __init__(self,
                 bins: int = 15,
                 collect_device: str = 'cpu',
                 prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.bins = bins

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Keeps confidence and correctness of each sample."""
        for sample in data_samples:
            confidence, label = sample['pred_score'].max(dim=0)
            self.results.append((float(confidence), int(label) == int(sample['gt_label'])))

    def compute_metrics(self, results: list) -> dict:
        """dict: 'ece' and the mean 'confidence', in percent."""
        confidence, correct = torch.tensor(results, dtype=torch.double).T
        return dict(
            ece=calibration_error(confidence, correct, self.bins),
            confidence=float(confidence.mean() * 100))
