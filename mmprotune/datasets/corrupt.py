"""The common image corruptions, as a transform."""
from __future__ import annotations

import hashlib
import inspect

import numpy as np
from mmcv.transforms import BaseTransform

from mmprotune.errors import OptionError
from mmprotune.registry import TRANSFORMS

# Hendrycks and Dietterich, https://arxiv.org/abs/1903.12261: fifteen that count, and four that
# were meant for validation.
COMMON = ('gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur',
          'motion_blur', 'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast',
          'elastic_transform', 'pixelate', 'jpeg_compression')
EXTRA = ('speckle_noise', 'gaussian_blur', 'spatter', 'saturate')
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # pixels


@TRANSFORMS.register_module()
class Corrupt(BaseTransform):
    """Corrupts an image as ImageNet-C does, at the size it has in the pipeline.

    The corruptions are those of the package ``imagecorruptions``; install
    ``imagecorruptions-imaug``, its maintained continuation (the original of 2020 does not run with
    current NumPy and scikit-image). Their strengths were chosen for images of 224 pixels: put the
    transform behind the resizing. The random part of each depends on ``seed``, the corruption and
    the image's name (or its index), not on the severity, the order or the number of workers.

    Args:
        corruption (str): One of ``COMMON`` or ``EXTRA``.
        severity (int): 1 to 5.
        channel_order (str): Of the images in the pipeline, 'bgr' (``LoadImageFromFile``) or 'rgb'.
            Defaults to 'bgr'.
        seed (int): Defaults to 0.

    Raises:
        ImportError: The package is missing, or is the original.
        OptionError: An argument has no such value, or an image is not uint8 of three channels, is
            smaller than 32 pixels, or has no name.
    """

    def __init__(self,
                 corruption: str,
                 severity: int,
                 channel_order: str = 'bgr',
                 seed: int = 0) -> None:
        if corruption not in COMMON + EXTRA:
            raise OptionError(f'corruption must be one of {", ".join(COMMON + EXTRA)}; '
                              f'got {corruption!r}')
        if severity not in SEVERITIES:
            raise OptionError(f'severity must be 1 to 5, got {severity!r}')
        if channel_order not in ('bgr', 'rgb'):
            raise OptionError(f"channel_order must be 'bgr' or 'rgb', got {channel_order!r}")
        self.corruption = corruption
        self.severity = int(severity)
        self.channel_order = channel_order
        self.seed = seed
        self._function = _load(corruption)
        # The random numbers of these come from a compiled function or a generator of their own.
        self._takes_seed = 'seed' in inspect.signature(self._function).parameters

    def transform(self, results: dict) -> dict:
        """Corrupts ``img``.

        Args:
            results (dict): ``img`` of shape (H, W, 3), uint8; ``img_path`` or ``sample_idx``.

        Returns:
            dict: ``results`` with the corrupted ``img``.
        """
        from PIL import Image
        image = results['img']
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise OptionError('Corrupt expects a uint8 image of shape (H, W, 3), got '
                              f'{image.dtype} of shape {image.shape}')
        if min(image.shape[:2]) < SMALLEST:
            raise OptionError(f'Corrupt expects images of at least {SMALLEST} pixels, got '
                              f'{image.shape[:2]}; put it behind the resizing')
        if self.channel_order == 'bgr':
            image = image[..., ::-1]
        seed = self._seed_of(results)
        kwargs = dict(seed=seed) if self._takes_seed else {}
        # The package draws from NumPy's global generator, which others must find as it was.
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            picture = Image.fromarray(np.ascontiguousarray(image))
            corrupted = np.uint8(self._function(picture, self.severity, **kwargs))
        finally:
            np.random.set_state(state)
        if self.channel_order == 'bgr':
            corrupted = corrupted[..., ::-1]
        results['img'] = np.ascontiguousarray(corrupted)
        return results

    def _seed_of(self, results: dict) -> int:
        if results.get('img_path'):
            # Folder and file: they outlive a move of the data set, or a choice of a part of it.
            key = '/'.join(str(results['img_path']).replace('\\', '/').split('/')[-2:])
        elif 'sample_idx' in results:
            key = str(results.get('row', results['sample_idx']))
        else:
            raise OptionError('Corrupt needs img_path or sample_idx to tell images apart, got '
                              f'{sorted(results)}')
        digest = hashlib.sha256(f'{self.seed}|{self.corruption}|{key}'.encode()).digest()
        return int.from_bytes(digest[:4], 'big') % (2**31)

    def __repr__(self) -> str:
        return (f'{type(self).__name__}(corruption={self.corruption!r}, severity={self.severity}, '
                f'channel_order={self.channel_order!r}, seed={self.seed})')


def _load(corruption: str):
    """The function of the package that corrupts."""
    hint = 'pip install imagecorruptions-imaug'
    try:
        from imagecorruptions import corruption_dict
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}; corruptions need: {hint}') from error
    except ImportError as error:
        raise ImportError(f'{error}; this imagecorruptions is not the maintained one: '
                          f'pip uninstall imagecorruptions, then {hint}') from error
    if 'seed' not in inspect.signature(corruption_dict['glass_blur']).parameters:
        raise ImportError('this imagecorruptions cannot be seeded: pip uninstall imagecorruptions, '
                          f'then {hint}')
    return corruption_dict[corruption]
