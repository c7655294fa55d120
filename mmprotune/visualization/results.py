"""Pictures of what models predict, by their host's own visualizer."""
from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, DefaultScope
from mmengine.visualization import Visualizer

VISUALIZER_OF = dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer',
                     mmpretrain='UniversalVisualizer')


def result_visualizer(cfg: Config, dataset_meta: Mapping | None, name: str) -> Visualizer:
    """The visualizer that draws a model's kind of result, and stores nothing.

    Args:
        cfg (Config): The model's; ``default_scope`` is one of the three hosts.
        dataset_meta (Mapping, optional): Classes and palette, as training noted them. Without a
            palette, classes get colours around the circle.
        name (str): Of the instance; MMEngine knows visualizers by name.

    Returns:
        Visualizer: The config's kind of it, or the host's.
    """
    scope = cfg.default_scope
    with DefaultScope.overwrite_default_scope(scope):
        visualizer = VISUALIZERS.build(dict(
            cfg.get('visualizer') or dict(type=VISUALIZER_OF[scope]), vis_backends=[], name=name))
    meta = dict(dataset_meta or {})
    if meta.get('classes') and not meta.get('palette'):  # which mmseg's cannot do without
        hues = np.linspace(0, 179, len(meta['classes']), endpoint=False, dtype=np.uint8)
        hsv = np.stack([hues, np.full_like(hues, 200), np.full_like(hues, 230)], axis=-1)
        rgb = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
        meta['palette'] = [tuple(colour) for colour in rgb.tolist()]
    visualizer.dataset_meta = meta
    return visualizer


def draw_result(visualizer: Visualizer, picture: np.ndarray, result: object,
                score_thr: float = 0.3) -> np.ndarray:
    """Draws one result.

    Args:
        visualizer (Visualizer): Of :func:`result_visualizer`.
        picture (np.ndarray): uint8 of shape (H, W, 3), RGB.
        result (object): ``DetDataSample``, ``SegDataSample`` or mmpretrain's ``DataSample``.
        score_thr (float): Boxes with a lower score are left out. Defaults to 0.3, mmdet's.

    Returns:
        np.ndarray: uint8 of shape (H, W, 3), RGB.
    """
    if hasattr(visualizer, 'visualize_cls'):  # mmpretrain's, a method for each task
        classes = visualizer.dataset_meta.get('classes')
        return visualizer.visualize_cls(picture, result, classes=classes, draw_gt=False)
    options = dict(pred_score_thr=score_thr) if 'pred_instances' in result else {}
    visualizer.add_datasample('result', picture, result, draw_gt=False, **options)
    return visualizer.get_image()
