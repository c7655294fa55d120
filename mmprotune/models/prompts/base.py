"""What every prompt block has in common."""
from __future__ import annotations

from collections.abc import Callable

from mmengine.model import BaseModule
from torch import Tensor


class BasePrompt(BaseModule):
    """Computes the prompt of one feature map; whoever calls adds it to the map.

    A block is registered in ``mmprotune.registry.MODELS`` and takes ``channels``, which
    :class:`~mmprotune.PromptedBackbone` fills in per stage, besides its own arguments. It maps
    (N, C, H, W) to (N, C, H, W) with ``C = channels``, for any H and W. It should start at zero,
    unless ``zero_init=False`` says otherwise (as ``last_stage='serial'`` does for the last stage).

    Where a block can be cut at a narrow place, it defines two methods, and ``forward`` is theirs:

    - ``down(x)`` takes the feature map and returns a hidden tensor of fewer channels,
    - ``up(hidden)`` takes that and returns the prompt.

    Both depend on their argument and the block's parameters only, so that the backward pass may
    compute again what it did not keep. Any other block defines ``forward(x)`` instead.
    """
    down: Callable[[Tensor], Tensor]
    up: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Computes the prompt.

        Args:
            x (Tensor): Feature map of shape (N, C, H, W).

        Returns:
            Tensor: Prompt of the same shape.
        """
        return self.up(self.down(x))
