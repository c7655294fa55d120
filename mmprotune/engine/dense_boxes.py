"""Boxes and scores of a dense head as a function of its maps, for files that run without mmdet."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def why_not(head: nn.Module) -> str:
    """Why :func:`boxes_of` does not do what a head does; '' where it does.

    Args:
        head (nn.Module): mmdet's.
    """
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    ours = isinstance(head, BaseDenseHead) and all(
        getattr(type(head), name) is getattr(BaseDenseHead, name)
        for name in ('predict_by_feat', '_predict_by_feat_single'))
    if not ours:
        return f'{type(head).__name__} makes boxes in a way of its own'
    if getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False):
        return f'{type(head).__name__} makes scores in a way of its own (loss_cls)'
    return ''


def boxes_of(head: nn.Module, raw: Sequence[Sequence[Tensor]], size: tuple[int, int],
             ) -> tuple[Tensor, Tensor]:
    """What a head's ``predict_by_feat`` has before it leaves anything out, of whole batches.

    Thresholds, the best of each level and NMS give every image another number of boxes; a file
    with fixed outputs ends before them.

    Args:
        head (nn.Module): One that :func:`why_not` has nothing against.
        raw (Sequence[Sequence[Tensor]]): What its ``forward`` returns: by level class scores of
            shape (N, A * C, H, W), boxes, and with some heads factors of the scores.
        size (tuple[int, int]): Height and width of the images; boxes end there.

    Returns:
        tuple[Tensor, Tensor]: Boxes (N, M, 4) as (x1, y1, x2, y2) in pixels, and scores (N, M, C),
        without that of a background.
    """
    from mmdet.structures.bbox import get_box_tensor
    batch = raw[0][0].shape[0]

    def joined(maps: Sequence[Tensor], width: int) -> Tensor:
        return torch.cat([level.permute(0, 2, 3, 1).reshape(batch, -1, width) for level in maps],
                         dim=1)

    scores = joined(raw[0], head.cls_out_channels)
    scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
    if len(raw) > 2 and raw[2] is not None:
        scores = scores * joined(raw[2], 1).sigmoid()
    coded = joined(raw[1], head.bbox_coder.encode_size)
    priors = torch.cat([get_box_tensor(level) for level in head.prior_generator.grid_priors(
        [level.shape[-2:] for level in raw[0]], dtype=coded.dtype, device=coded.device)])
    # Coders read a batch of them in another, deprecated way.
    boxes = head.bbox_coder.decode(priors.repeat(batch, 1), coded.flatten(0, 1), max_shape=size)
    return get_box_tensor(boxes).reshape(batch, -1, 4), scores
