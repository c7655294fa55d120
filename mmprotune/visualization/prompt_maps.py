"""Where in an image prompts act, and how strongly."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np
from torch import Tensor


def draw_prompt_maps(images: Sequence[np.ndarray],
                     recorded: Mapping[str, tuple[Tensor, Tensor, tuple[int, int]]],
                     ) -> Iterator[tuple[int, str, float, np.ndarray]]:
    """Draws each prompt's map over each image, from blue (nothing) to red (the strongest there).

    Args:
        images (Sequence[np.ndarray]): uint8 of shape (H, W, 3), RGB: what the network saw, without
            padding, which is at the right and at the bottom.
        recorded (Mapping): What :meth:`~mmprotune.PromptedBackbone.record_maps` noted meanwhile.

    Yields:
        tuple[int, str, float, np.ndarray]: Index of the image, stage name, the strongest value
        (norm of the prompt over that of the feature that it is added to; no unit), and the picture,
        uint8 of shape (H, W, 3), RGB.
    """
    for name, (prompt, feature, size) in recorded.items():
        ratios = (prompt / feature.clamp_min(1e-12)).cpu().numpy()
        for index, (image, ratio) in enumerate(zip(images, ratios)):
            height, width = image.shape[:2]
            strongest = float(ratio.max())
            large = cv2.resize(ratio, size[::-1], interpolation=cv2.INTER_LINEAR)
            shade = np.uint8(255 * np.clip(large[:height, :width] / max(strongest, 1e-12), 0, 1))
            colours = cv2.applyColorMap(shade, cv2.COLORMAP_JET)[..., ::-1]
            yield index, name, strongest, cv2.addWeighted(
                np.ascontiguousarray(image), 0.5, np.ascontiguousarray(colours), 0.5, 0)


def as_images(inputs: Sequence[Tensor], preprocessor: object) -> list[np.ndarray]:
    """Images of a batch as they are before the model's preprocessor.

    Args:
        inputs (Sequence[Tensor]): Of shape (3, H, W) each, values from 0 to 255.
        preprocessor (object): The model's; says whether they are BGR.

    Returns:
        list[np.ndarray]: uint8 of shape (H, W, 3), RGB.
    """
    swap = any(getattr(preprocessor, name, None)
               for name in ('_channel_conversion', 'channel_conversion', 'to_rgb'))
    pictures = [image.permute(1, 2, 0).clamp(0, 255).cpu().numpy().astype(np.uint8)
                for image in inputs]
    return [np.ascontiguousarray(p[..., ::-1]) if swap else p for p in pictures]
