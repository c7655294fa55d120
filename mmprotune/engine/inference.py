"""Inference as the hosts' own functions do it, one image at a time.

mmdet's ``inference_detector``, mmseg's ``inference_model`` and mmpretrain's
``ImageClassificationInferencer`` build transforms anew in every call, in whatever scope is the
default one at that moment: several libraries side by side, or in several threads, get in each
other's way. Here they are built once.
"""
from __future__ import annotations

import copy
import os

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, default_collate
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmprotune.checkpoints.untrusted import HOSTS, check_config
from mmprotune.config_nodes import parse_config, type_name
from mmprotune.engine import cli
from mmprotune.errors import DataError, TrunkError


def check_image(image: object) -> str | np.ndarray:
    """Checks that something is an image before any model sees it.

    Args:
        image (str | os.PathLike | numpy.ndarray): A path, an address, or an array of shape
            (H, W, 3), BGR, as OpenCV reads it.

    Returns:
        str | numpy.ndarray: What the hosts take.

    Raises:
        DataError: It is none.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or not image.size or image.dtype.kind not in 'uf':
            raise DataError('an image must be an array of numbers of shape (height, width, 3), got '
                            f'shape {image.shape} of {image.dtype}')
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise DataError('an image must be a path or an array of shape (height, width, 3), got '
                        f'{type(image).__name__}')
    image = os.fspath(image)
    if '://' not in image:
        if not os.path.isfile(image):
            raise DataError(f'{image}: no such image file')
        from mmprotune.datasets.checked import check_image_file  # with mmseg, which takes seconds
        check_image_file(image)
        if not cv2.haveImageReader(image):
            raise DataError(f'{image}: no image that OpenCV can read')
    return image


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """Where models are to run.

    Args:
        device (str | torch.device, optional): Defaults to None: a GPU where there is one, else the
            CPU.

    Raises:
        TrunkError: There is no such device.
    """
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # PyTorch has a kind for each build and backend
        first = (str(error).splitlines() or [''])[0]
        raise TrunkError(f'device: {device!r} cannot be used: {first}') from error


def config_of(loaded: dict, path: str, config: Config | str | os.PathLike | None,
              naming: str) -> Config:
    """The config to a checkpoint, not the caller's own object.

    Args:
        loaded (dict): The checkpoint.
        path (str): Where it came from, for errors.
        config (Config | str | os.PathLike, optional): None: the one in the checkpoint, which is
            read, not run.
        naming (str): How the caller names a config, for errors.

    Raises:
        TrunkError: There is none, or none that can be read.
        LaunchError: No such file.
    """
    if isinstance(config, Config):
        return Config(config.to_dict())
    if config is not None:
        return cli.load_config(os.fspath(config))
    meta = loaded.get('meta') if isinstance(loaded.get('meta'), dict) else {}
    text = meta.get('cfg')
    if not isinstance(text, str):
        raise TrunkError(f'{path} holds no config (meta.cfg); name it: {naming}')
    try:
        cfg = parse_config(text)
        check_config(cfg)
    except ValueError as error:
        raise TrunkError(f'{path}: the config in it (meta.cfg) cannot be used, {error}; name one: '
                         f'{naming}') from error
    return cfg


def check_host(cfg: Config) -> str:
    """``cfg.default_scope``, one of the three hosts.

    Raises:
        TrunkError: It is another one.
    """
    host = cfg.get('default_scope')
    if host not in HOSTS:
        raise TrunkError(f'default_scope must be one of {", ".join(HOSTS)}, got {host!r}')
    return host


class Inference:
    """Runs one model on single images; results are those of its host's own function.

    Args:
        model (nn.Module): The model, in eval mode.
        cfg (Config): Its config.

    Raises:
        TrunkError: ``default_scope`` is none of the three hosts, or there is no test pipeline.
    """

    def __init__(self, model: nn.Module, cfg: Config) -> None:
        self.model = model
        self.host = check_host(cfg)
        with DefaultScope.overwrite_default_scope(self.host):
            self._of_files, self._of_arrays = (self._build(test_pipeline(cfg), arrays)
                                               for arrays in (False, True))

    def _build(self, steps: list, arrays: bool) -> Compose:
        if self.host == 'mmpretrain':
            steps = [step for step in steps if type_name(step) != 'LoadImageFromFile']
        elif self.host == 'mmseg':
            steps = [step for step in steps if type_name(step) != 'LoadAnnotations']
        if arrays and self.host != 'mmpretrain':
            steps[0]['type'] = f'{self.host}.LoadImageFromNDArray'
        return Compose(steps)

    def prepare(self, image: str | np.ndarray) -> dict:
        """A batch of one for ``model.test_step``."""
        arrays = isinstance(image, np.ndarray)
        item = dict(img=image) if arrays else dict(img_path=image)
        if self.host == 'mmdet':
            item['img_id'] = 0
        elif self.host == 'mmpretrain':
            from mmcv.image import imread
            picture = imread(image)
            item = dict(img=picture, img_shape=picture.shape[:2], ori_shape=picture.shape[:2])
        item = (self._of_arrays if arrays else self._of_files)(item)
        if self.host == 'mmpretrain':
            return default_collate([item])
        return dict(inputs=[item['inputs']], data_samples=[item['data_samples']])

    def __call__(self, image: str | np.ndarray):
        """The result for one image: ``DetDataSample``, ``SegDataSample`` or mmpretrain's
        ``DataSample``."""
        with torch.no_grad():
            return self.model.test_step(self.prepare(image))[0]

    def model_input(self, image: str | np.ndarray) -> Tensor:
        """What the backbone would be given, of shape (1, 3, H, W)."""
        return self.model.data_preprocessor(self.prepare(image), False)['inputs']


def test_pipeline(cfg: Config) -> list:
    """A copy of the transforms that the host's own function takes.

    Raises:
        TrunkError: The config has none.
    """
    if cfg.default_scope == 'mmseg' and 'test_pipeline' in cfg:
        return copy.deepcopy(cfg.test_pipeline)
    node = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in node and ('dataset' in node or node.get('datasets')):
        node = node.dataset if 'dataset' in node else node.datasets[0]
    if not node.get('pipeline'):
        raise TrunkError('the config has no test pipeline: expected '
                         'test_dataloader.dataset.pipeline')
    return copy.deepcopy(node.pipeline)
