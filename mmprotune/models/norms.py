"""Frozen norms that have nothing to synchronise."""
from __future__ import annotations

from collections.abc import Collection

from mmengine.model import revert_sync_batchnorm
from torch import nn


def stop_synchronising(backbone: nn.Module, frozen: Collection[str]) -> list[str]:
    """Makes frozen SyncBatchNorm layers BatchNorm layers, in place.

    Their statistics stand still, so that the results are the same. MMEngine's Runner does this for
    all of them where there is one process, by modules that have neither hooks nor lean classes.

    Args:
        backbone (nn.Module): The backbone.
        frozen (Collection[str]): Its frozen parameters and buffers, dotted names.

    Returns:
        list[str]: Dotted names of the layers.
    """
    found = []
    for name, norm in list(backbone.named_modules()):
        # PyTorch's and mmcv's are called the same, and so are their lean classes.
        if name and type(norm).__name__ == 'SyncBatchNorm':
            own = [*norm.named_parameters(name), *norm.named_buffers(name)]
            if all(path in frozen for path, _ in own):
                parent, _, child = name.rpartition('.')
                setattr(backbone.get_submodule(parent), child, revert_sync_batchnorm(norm))
                found.append(name)
    return found
