"""Shows where prompts act, in every visualizer of a run."""
from __future__ import annotations

import contextlib

from mmengine.hooks import Hook

from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.engine.processes import unwrapped
from mmprotune.errors import OptionError
from mmprotune.registry import HOOKS
from mmprotune.visualization import as_images, draw_prompt_maps


@HOOKS.register_module()
class PromptMapHook(Hook):
    """Draws, for the first images of each validation and test, where each prompt acts and how
    strongly: the norm of the prompt over that of its feature, at each pixel, over the image. Red is
    the strongest value of that picture. TensorBoard, W&B and the other backends of MMEngine's
    visualizer show the pictures as ``prompt_map_<image>_<stage>``.

    Args:
        images (int): How many. Defaults to 4.
    """

    def __init__(self, images: int = 4) -> None:
        if not isinstance(images, int) or images < 1:
            raise OptionError(f'images must be a positive int, got {images!r}')
        self.images = images
        self._open = contextlib.ExitStack()
        self._recorded: list[tuple[str, dict]] = []
        self._seen = 0

    def before_val_epoch(self, runner) -> None:
        self._seen = 0

    before_test_epoch = before_val_epoch

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self._seen < self.images:
            parts = prompted_parts(unwrapped(runner.model))
            # No slash: MMEngine's local backend makes no folders.
            self._recorded = [('' if len(parts) == 1 else f'{path}_',
                               self._open.enter_context(part.record_maps()))
                              for path, part in parts]

    before_test_iter = before_val_iter

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._open.close()
        recorded, self._recorded = self._recorded, []
        if not recorded:
            return
        images = as_images(data_batch['inputs'], unwrapped(runner.model).data_preprocessor)
        images = images[:self.images - self._seen]
        for prefix, found in recorded:
            for index, stage, _, picture in draw_prompt_maps(images, found):
                runner.visualizer.add_image(
                    f'prompt_map_{self._seen + index}_{prefix}{stage}', picture, runner.iter)
        self._seen += len(images)

    after_test_iter = after_val_iter

    def after_val_epoch(self, runner, metrics=None) -> None:
        self._open.close()

    after_test_epoch = after_val_epoch
