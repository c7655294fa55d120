"""CamVid, which MMSegmentation has no class for."""
from __future__ import annotations

from mmseg.datasets import BaseSegDataset

from mmprotune.registry import DATASETS


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """Driving scenes with eleven classes, http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/.

    Labels are the indices that SegNet introduced: 0 to 10, and 11 for what has no label. The latter
    is no class; MMSegmentation's own label map turns it into the index that losses and metrics
    ignore.

    Args:
        metainfo (dict, optional): Its ``classes`` picks some of the classes. Defaults to None: the
            eleven.
        img_suffix (str): Suffix of the images. Defaults to '.png'.
        seg_map_suffix (str): Suffix of the label images. Defaults to '.png'.
        **kwargs: Arguments of :class:`mmseg.datasets.BaseSegDataset`.
    """
    METAINFO = dict(
        classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car',
                 'pedestrian', 'bicyclist', 'unlabelled'),
        palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
                 [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0],
                 [0, 128, 192], [0, 0, 0]])

    def __init__(self, metainfo: dict | None = None, img_suffix: str = '.png',
                 seg_map_suffix: str = '.png', **kwargs) -> None:
        super().__init__(
            metainfo=dict(dict(classes=self.METAINFO['classes'][:-1]), **(metainfo or {})),
            img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)
