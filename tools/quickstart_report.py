"""The picture of the quickstart: predictions beside the ground truth."""
from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from torch import nn

ZOOM = 3
ROWS = 4
SCORE = 0.5


def load(config: Path, checkpoint: Path, options: dict) -> nn.Module:
    """The detector, on the CPU, in eval mode."""
    return init_detector(str(config), str(checkpoint), device='cpu', cfg_options=dict(options))


def draw(file: Path, data: Path, names: list[str], models: list[nn.Module]) -> None:
    """Draws the ground truth of some validation images and what each model finds in them.

    Args:
        file (Path): PNG to write.
        data (Path): Folder of the drawn COCO set.
        names (list[str]): What to write above the models' columns.
        models (list[nn.Module]): The detectors.
    """
    np.random.seed(0)  # the visualizer varies its colours
    coco = COCO(str(data / 'val.json'))
    visualizer = DetLocalVisualizer(line_width=2, alpha=0.45)
    visualizer.dataset_meta = models[0].dataset_meta
    # The fullest scenes say most.
    count = {i: len(coco.getAnnIds(i)) for i in coco.getImgIds()}
    rows = []
    for image_id in sorted(count, key=lambda i: (-count[i], i))[:ROWS]:
        path = data / 'val' / coco.loadImgs(image_id)[0]['file_name']
        image = cv2.imread(str(path))
        cells = [_picture(visualizer, image, _truth(coco, image_id))]
        for model in models:
            found = inference_detector(model, image).pred_instances
            cells.append(_picture(visualizer, image, found))
        rows.append(np.concatenate(cells, axis=1))
    titles = [_title(text, cells[0].shape[1]) for text in ('ground truth', *names)]
    page = np.concatenate([np.concatenate(titles, axis=1), *rows])
    if not cv2.imwrite(str(file), page):
        raise OSError(f'could not write {file}')


def _truth(coco: COCO, image_id: int) -> InstanceData:
    """The annotations of one image as mmdet holds them."""
    annotations = coco.loadAnns(coco.getAnnIds(image_id))
    boxes = torch.tensor([a['bbox'] for a in annotations])
    boxes[:, 2:] += boxes[:, :2]
    # Categories are numbered from 1 in the order of the classes.
    return InstanceData(
        bboxes=boxes, labels=torch.tensor([a['category_id'] - 1 for a in annotations]),
        masks=torch.from_numpy(np.stack([coco.annToMask(a) for a in annotations])).bool())


def _picture(visualizer: DetLocalVisualizer, image: np.ndarray,
             instances: InstanceData) -> np.ndarray:
    """One image with instances drawn on it, enlarged, BGR."""
    masks = instances.masks.cpu().numpy().astype(np.float32)
    side = (image.shape[1] * ZOOM, image.shape[0] * ZOOM)
    large = [cv2.resize(mask, side, interpolation=cv2.INTER_LINEAR) > 0.5 for mask in masks]
    scaled = InstanceData(bboxes=instances.bboxes.cpu() * ZOOM, labels=instances.labels.cpu(),
                          masks=np.array(large, dtype=bool).reshape(-1, *side[::-1]))
    predicted = 'scores' in instances
    if predicted:
        scaled.scores = instances.scores.cpu()
    sample = DetDataSample(**{'pred_instances' if predicted else 'gt_instances': scaled})
    canvas = cv2.resize(image, side, interpolation=cv2.INTER_CUBIC)
    visualizer.add_datasample('', canvas[..., ::-1], sample, draw_gt=not predicted,
                              draw_pred=predicted, pred_score_thr=SCORE)
    drawn = visualizer.get_image()[..., ::-1]
    return cv2.copyMakeBorder(drawn, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _title(text: str, width: int) -> np.ndarray:
    strip = np.full((44, width, 3), 255, np.uint8)
    cv2.putText(strip, text, (8, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (40, 40, 40), 2, cv2.LINE_AA)
    return strip
