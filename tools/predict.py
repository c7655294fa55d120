"""Runs a checkpoint of a prompted model on images, through its host's own inferencer.

DIR gets pictures/ with the predictions drawn in, and predictions.json: boxes and masks in COCO's
form for a detector, scores of all classes for a classifier. A segmentor also leaves labels/, one
image of class numbers for each.
"""
from __future__ import annotations

import argparse
import glob
import json
import os.path as osp
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.progress import Progress
from torch import nn

from mmprotune.checkpoints.loading import fill
from mmprotune.checkpoints.reading import read, state_dict_of
from mmprotune.checkpoints.writing import write_bytes
from mmprotune.config_nodes import type_name
from mmprotune.engine import cli
from mmprotune.engine.inference import (
    check_host,
    check_image,
    config_of,
    test_pipeline,
    usable_device,
)
from mmprotune.errors import DataError, LaunchError
from mmprotune.visualization import draw_result, result_visualizer
from mmprotune.visualization.results import VISUALIZER_OF

IMAGES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.mpg', '.mpeg', '.m4v', '.wmv')
# What the results of the three inferencers hold.
RESULT_OF = dict(mmdet='pred_instances', mmseg='pred_sem_seg', mmpretrain='pred_score')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE',
                        help='files, folders (their image files) and quoted patterns: "a/**/*.jpg"')
    parser.add_argument('--weights', required=True, metavar='CHECKPOINT',
                        help='local checkpoint, slim or full')
    parser.add_argument('--config', help='its config; left out, the one in the checkpoint')
    parser.add_argument('--out', type=Path, default=Path('predictions'), metavar='DIR',
                        help='new or empty folder (default: predictions)')
    parser.add_argument('--device', help='default: a GPU where there is one')
    parser.add_argument('--batch-size', type=int, default=1, metavar='N',
                        help='images at a time; only images of one size share a batch')
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='SCORE',
                        help='boxes below are not drawn; predictions.json has all')
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f'--batch-size must be at least 1, got {args.batch_size}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Predicts.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    cli.check_checkpoint_path('--weights', args.weights)
    files = find_images(args.images)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise LaunchError(f'--out: {args.out} exists and is not an empty folder; name another')
    predictor = Predictor(args.weights, args.config, args.device)
    names = output_names(files)
    report = REPORTS[predictor.host](predictor.classes)
    try:
        with Progress() as bar:
            task = bar.add_task('Predicting', total=len(files))
            for chunk, pictures in in_batches(files, args.batch_size):
                for file, picture, result in zip(chunk, pictures, predictor(chunk)):
                    drawn = draw_result(predictor.visualizer, picture, result, args.score_thr)
                    _save(args.out / 'pictures' / f'{names[file]}.jpg', drawn[..., ::-1])
                    report.add(args.out, file, names[file], picture.shape[:2], result)
                bar.advance(task, len(chunk))
    finally:  # what was predicted before an error stays, with its pictures
        if report.count:
            text = json.dumps(report.content) + '\n'
            write_bytes(text.encode(), args.out / 'predictions.json')
            print(f'{report.count} of {len(files)} images: {args.out}')


# --- images -----------------------------------------------------------------------------------


def find_images(named: Sequence[str]) -> list[str]:
    """The files behind paths, folders, patterns and addresses; each once, each checked.

    Raises:
        DataError: There are none, or one is no image.
    """
    found: dict[str, None] = {}
    for name in named:
        if '://' in name or osp.isfile(name):
            files = [name]
        elif osp.isdir(name):
            files = sorted(osp.join(name, inner) for inner in _listdir(name)
                           if inner.lower().endswith(IMAGES))
            if not files:
                raise DataError(f'{name}: a folder without image files ({", ".join(IMAGES)})')
        else:
            files = sorted(filter(osp.isfile, glob.glob(name, recursive=True)))
            if not files:
                raise DataError(f'{name}: no such file or folder, and no pattern that fits any')
        for file in files:
            if file.lower().endswith(VIDEOS):
                raise DataError(f"{file}: a video, and the hosts' inferencers take images; cut it "
                                f'up first: ffmpeg -i {file} frames/%06d.png')
            found[check_image(file)] = None
    return list(found)


def _listdir(folder: str) -> list[str]:
    return [path.name for path in Path(folder).iterdir() if path.is_file()]


def output_names(files: Sequence[str]) -> dict[str, str]:
    """Names of output files, without suffix: the images' own, numbered where two share one."""
    stems = [Path(file.rpartition('://')[2]).stem for file in files]
    # Not all file systems tell cases apart.
    unique = len({stem.lower() for stem in stems}) == len(stems)
    return {file: stem if unique else f'{number:05d}_{stem}'
            for number, (file, stem) in enumerate(zip(files, stems))}


def in_batches(files: Sequence[str], size: int) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Neighbouring images of one size, with their pixels, uint8 of shape (H, W, 3), RGB.

    Of two sizes, mmseg and mmpretrain can make no batch.
    """
    from mmcv.image import imread
    chunk: list[str] = []
    pictures: list[np.ndarray] = []
    for file in files:
        picture = imread(file, channel_order='rgb')
        if picture is None:
            raise DataError(f'{file}: no image that OpenCV can read')
        if chunk and (len(chunk) == size or picture.shape != pictures[0].shape):
            yield chunk, pictures
            chunk, pictures = [], []
        chunk.append(file)
        pictures.append(picture)
    yield chunk, pictures


def _save(file: Path, picture: np.ndarray) -> None:
    from mmcv.image import imwrite
    if not imwrite(np.ascontiguousarray(picture), str(file)):
        raise DataError(f'{file} could not be written')


# --- model ------------------------------------------------------------------------------------


class Predictor:
    """A host's inferencer with a checkpoint in it.

    Args:
        weights (str): The checkpoint.
        config (str, optional): Its config; None: the one in it.
        device (str, optional): None: a GPU where there is one.

    Raises:
        MMProtuneError: The checkpoint cannot be read or does not fit the config's model, or the
            model is of none of the three hosts' inferencers.
    """

    def __init__(self, weights: str, config: str | None, device: str | None) -> None:
        loaded = read(weights)
        state_dict_of(loaded, weights)
        cfg = config_of(loaded, weights, config, '--config CONFIG')
        self.host = check_host(cfg)
        _prepare(cfg)
        device = str(usable_device(device))
        init_default_scope(self.host)
        self._inferencer, model = BUILD[self.host](cfg, weights, device)
        # The hosts' loading only warns of keys that are missing or left over.
        fill(model, loaded, weights)
        meta = getattr(model, 'dataset_meta', None) or getattr(model, '_dataset_meta', None) or {}
        self.classes = [str(name) for name in meta.get('classes') or ()]
        self.visualizer = result_visualizer(cfg, meta, 'predict')

    def __call__(self, files: list[str]) -> list:
        """Results of images that make one batch.

        Raises:
            LaunchError: They are of another kind than an inferencer's.
        """
        results = self._inferencer(files)
        if RESULT_OF[self.host] not in results[0]:
            raise LaunchError(f'the model predicts {", ".join(results[0].keys())}, expected '
                              f'{RESULT_OF[self.host]}: a detector, a segmentor or a classifier')
        return results


def _prepare(cfg: Config) -> None:
    """Brings a config into the form that all three inferencers can read."""
    steps = test_pipeline(cfg)
    if check_host(cfg) == 'mmseg':  # which finds these by their exact names
        steps = [step for step in steps
                 if type_name(step) not in ('LoadAnnotations', 'LoadDepthAnnotation')]
    if type_name(steps[0]) != 'LoadImageFromFile':
        raise LaunchError('the test pipeline must begin with LoadImageFromFile, got '
                          f'{type_name(steps[0])}')
    steps[0]['type'] = 'LoadImageFromFile'
    cfg.test_pipeline = steps
    # Of data sets inside data sets, the inferencers look at the outermost.
    loader = cfg.setdefault('test_dataloader', {})
    node = loader.get('dataset') or {}
    while 'pipeline' not in node and ('dataset' in node or node.get('datasets')):
        node = node['dataset'] if 'dataset' in node else node['datasets'][0]
    loader['dataset'] = dict(node, pipeline=steps)
    if cfg.model.get('data_preprocessor') is None and cfg.get('data_preprocessor'):
        cfg.model.data_preprocessor = cfg.data_preprocessor
    # The inferencers delete it on the model, which would have handed it on.
    if cfg.model.get('pretrained') and cfg.model.get('backbone'):
        cfg.model.backbone.pretrained = cfg.model.pop('pretrained')
    cfg.visualizer = dict(cfg.get('visualizer') or dict(type=VISUALIZER_OF[cfg.default_scope]),
                          vis_backends=[])


def _detection(cfg: Config, weights: str, device: str) -> tuple[Callable, nn.Module]:
    from mmdet.apis import DetInferencer
    inferencer = DetInferencer(cfg, weights, device=device, show_progress=False)
    return lambda files: inferencer(
        files, batch_size=len(files), return_datasamples=True)['predictions'], inferencer.model


def _segmentation(cfg: Config, weights: str, device: str) -> tuple[Callable, nn.Module]:
    from mmseg.apis import MMSegInferencer
    inferencer = MMSegInferencer(cfg, weights, device=device)
    inferencer.show_progress = False

    def run(files: list[str]) -> list:
        found = inferencer(files, batch_size=len(files), return_datasamples=True)
        return found if isinstance(found, list) else [found]

    return run, inferencer.model


def _classification(cfg: Config, weights: str, device: str) -> tuple[Callable, nn.Module]:
    from mmpretrain.apis import ImageClassificationInferencer
    from mmpretrain.utils import progress
    progress.disable_progress_bar = True
    inferencer = ImageClassificationInferencer(cfg, weights, device=device)
    return lambda files: inferencer(
        files, batch_size=len(files), return_datasamples=True), inferencer.model


BUILD = dict(mmdet=_detection, mmseg=_segmentation, mmpretrain=_classification)

# --- predictions.json -------------------------------------------------------------------------


class _Report:
    """What is written of all images."""

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.content: dict = dict(images=[])

    @property
    def count(self) -> int:
        return len(self.content['images'])

    def add(self, out: Path, file: str, name: str, size: tuple[int, int], result) -> None:
        """Notes one result.

        Args:
            out (Path): ``--out``.
            file (str): The image.
            name (str): Its pictures are called so.
            size (tuple[int, int]): (H, W).
            result: The inferencer's.
        """
        entry = dict(id=self.count + 1, file_name=file, height=size[0], width=size[1],
                     picture=f'pictures/{name}.jpg')
        entry.update(self._of(out, name, entry, result))
        self.content['images'].append(entry)

    def _class(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)


class _Boxes(_Report):
    """COCO's form: what pycocotools.coco.COCO reads, with scores."""

    def __init__(self, classes: list[str]) -> None:
        super().__init__(classes)
        self.content.update(annotations=[], categories=[
            dict(id=label + 1, name=name) for label, name in enumerate(classes)])

    def _of(self, out: Path, name: str, entry: dict, result) -> dict:
        from mmdet.structures.mask import encode_mask_results
        found = result.pred_instances.cpu()
        masks = encode_mask_results(found.masks.numpy()) if 'masks' in found else None
        annotations = self.content['annotations']
        for i in range(len(found)):
            x1, y1, x2, y2 = (float(value) for value in found.bboxes[i].tolist())
            one = dict(
                id=len(annotations) + 1, image_id=entry['id'],
                category_id=int(found.labels[i]) + 1, score=float(found.scores[i]),
                bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=0)
            if masks is not None:
                counts = masks[i]['counts']
                one['segmentation'] = dict(
                    size=[int(side) for side in masks[i]['size']],
                    counts=counts.decode() if isinstance(counts, bytes) else counts)
                one['area'] = int(found.masks[i].sum())
            annotations.append(one)
        return {}


class _Labels(_Report):
    """Names of label images, and how much of each each class takes."""

    def __init__(self, classes: list[str]) -> None:
        super().__init__(classes)
        self.content['classes'] = classes

    def _of(self, out: Path, name: str, entry: dict, result) -> dict:
        labels = result.pred_sem_seg.data[0].cpu().numpy()
        _save(out / 'labels' / f'{name}.png',
              labels.astype(np.uint8 if labels.max() < 256 else np.uint16))
        numbers, counts = np.unique(labels, return_counts=True)
        return dict(labels=f'labels/{name}.png', share={
            self._class(int(number)): round(count / labels.size, 4)
            for number, count in zip(numbers, counts.tolist())})


class _Scores(_Report):
    """The class and the scores of all of them."""

    def __init__(self, classes: list[str]) -> None:
        super().__init__(classes)
        self.content['classes'] = classes

    def _of(self, out: Path, name: str, entry: dict, result) -> dict:
        scores = result.pred_score.cpu().tolist()
        label = int(np.argmax(scores))
        return {'label': label, 'class': self._class(label), 'scores': scores}


REPORTS = dict(mmdet=_Boxes, mmseg=_Labels, mmpretrain=_Scores)

if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
