"""What of a host's model is a function of images alone."""
from __future__ import annotations

import inspect

from torch import Tensor, nn

from mmprotune.errors import ExportError
from mmprotune.lean.dry_run import tensors_in

from .dense_boxes import boxes_of, why_not


class Network(nn.Module):
    """What of a model is exported, as a function of images alone.

    Args:
        model (nn.Module): The host's.
        host (str): Which.
        boxes (bool): Whether a one-stage detector gives boxes and scores, in place of its head's
            raw outputs. Defaults to False.

    Attributes:
        kind (str): classifier, segmentor or detector.
        note (str): What is left out of the model; '' where nothing is.

    Raises:
        ExportError: No sound part of it is one function of images, or it has no such boxes.
    """

    def __init__(self, model: nn.Module, host: str, boxes: bool = False) -> None:
        super().__init__()
        self.model = model
        kind = type(model).__name__
        self.note = ''
        if host == 'mmpretrain' and callable(getattr(model, 'extract_feat', None)) and \
                getattr(model, 'head', None) is not None:
            self.kind, self._outputs = 'classifier', self._classify
        elif host == 'mmseg' and callable(getattr(model, 'encode_decode', None)):
            self.kind, self._outputs = 'segmentor', self._segment
            if (getattr(model, 'test_cfg', None) or {}).get('mode') == 'slide':
                self.note = ("test_cfg.mode='slide': the file computes one window; the host cuts "
                             'images into windows and averages where they overlap')
        elif host == 'mmdet':
            self.kind, self._outputs = 'detector', self._detect
            self._check_detector(kind)
            if boxes:
                self._check_boxes(kind)
        else:
            raise ExportError(f'{kind} does not export: expected a classifier with a head, a '
                              'segmentor, or a detector with a dense head')
        if boxes and self.kind != 'detector':
            raise ExportError(f'--boxes: {kind} is a {self.kind}, expected a one-stage detector')

    def _check_detector(self, kind: str) -> None:
        from mmdet.models import SingleStageDetector, TwoStageDetector
        if isinstance(self.model, SingleStageDetector) and not getattr(
                self.model, 'with_mask', False):
            self.note = ("the file holds backbone, neck and dense head; boxes are made of its raw "
                         "outputs by the head's predict_by_feat")
        elif isinstance(self.model, TwoStageDetector) and self.model.with_rpn:
            self.note = ('the file holds backbone, neck and RPN head; the second stage (roi_head) '
                         'works on boxes, whose number depends on the image, and is left out')
        else:
            raise ExportError(f'{kind} does not export: expected a one-stage or two-stage detector '
                              'with a dense head (its queries or masks need more than the images)')

    def _check_boxes(self, kind: str) -> None:
        head = getattr(self.model, 'bbox_head', None)
        reason = why_not(head) if head is not None else (
            f'{kind} has two stages, expected a one-stage detector')
        if reason:
            raise ExportError(f'--boxes: {reason}; without it the raw outputs are exported')
        self._outputs = self._detect_boxes
        self.note = ('boxes are (x1, y1, x2, y2) in pixels of the image, scores of the classes '
                     'beside them; thresholds and NMS (test_cfg) are left to the reader')

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._outputs(image).values())

    def named(self, image: Tensor) -> dict[str, Tensor]:
        """Outputs by name.

        Args:
            image (Tensor): As the model's preprocessor leaves it, of shape (N, 3, H, W).
        """
        return self._outputs(image)

    def _classify(self, image: Tensor) -> dict[str, Tensor]:
        return numbered('logits', self.model(image, mode='tensor'))

    def _segment(self, image: Tensor) -> dict[str, Tensor]:
        meta = dict(img_shape=image.shape[2:], pad_shape=image.shape[2:])
        return numbered('logits', self.model.encode_decode(image, [meta]))

    def _detect(self, image: Tensor) -> dict[str, Tensor]:
        maps = self.model.extract_feat(image)
        head, found = getattr(self.model, 'bbox_head', None), {}
        if head is None:
            head, found = self.model.rpn_head, numbered('feature', maps, always=True)
        raw = head(maps)
        raw = raw if isinstance(raw, tuple) else (raw, )
        # The loss names what `forward` returns; heads of old call it otherwise.
        names = [*inspect.signature(head.loss_by_feat).parameters][:len(raw)]
        for i, value in enumerate(raw):
            name = names[i] if i < len(names) else f'head{i}'
            found.update(numbered(name, value, always=True))
        return found

    def _detect_boxes(self, image: Tensor) -> dict[str, Tensor]:
        head = self.model.bbox_head
        found = boxes_of(head, head(self.model.extract_feat(image)), image.shape[2:])
        return dict(zip(('boxes', 'scores'), found))


def numbered(name: str, value: object, always: bool = False) -> dict[str, Tensor]:
    """The tensors in an output, by a name and, where there are several, a number."""
    tensors = list(tensors_in(value))
    if len(tensors) == 1 and not always:
        return {name: tensors[0]}
    return {f'{name}_{i}': tensor for i, tensor in enumerate(tensors)}
