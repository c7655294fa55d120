"""Checks that what a model declares frozen is frozen, and stays bitwise what it was."""
from __future__ import annotations

from torch import nn

from mmprotune.errors import FrozenTensorsChanged, listed

from .fingerprint import digest_tensors, fingerprint, identity
from .freeze import frozen_tensors, live_modules


def _frozen_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Submodules that declare ``frozen_names``: prompted backbones, under any wrapper."""
    parts = [(path, m) for path, m in model.named_modules()
             if isinstance(m.__dict__.get('frozen_names'), (set, frozenset))]
    if not parts:
        raise ValueError('audit expects a model that holds a PromptedBackbone, '
                         f'got {type(model).__name__} without one')
    return parts


class FrozenSnapshot:
    """Digests of everything a model declares frozen, to compare with later.

    Args:
        model (nn.Module): A model that holds one or more prompted backbones.
    """

    def __init__(self, model: nn.Module) -> None:
        self.digests = self._digest(model)

    @staticmethod
    def _digest(model: nn.Module) -> dict[str, str]:
        digests = {}
        for path, part in _frozen_parts(model):
            prefix = f'{path}.backbone.' if path else 'backbone.'
            tensors = frozen_tensors(part.backbone, part.frozen_names)
            digests.update((prefix + n, d) for n, d in digest_tensors(tensors).items())
        return digests

    def moved(self, model: nn.Module) -> list[str]:
        """Names of the frozen tensors that are not bitwise what they were.

        Args:
            model (nn.Module): The same model, later.

        Returns:
            list[str]: Sorted dotted names; empty when nothing moved.
        """
        now = self._digest(model)
        return sorted(n for n in {*now, *self.digests} if now.get(n) != self.digests.get(n))


def audit(model: nn.Module, snapshot: FrozenSnapshot | None = None, training: bool = False) -> None:
    """Checks that everything declared frozen is frozen.

    That is: no frozen parameter requires or holds a gradient; no frozen submodule is in training
    mode; the frozen tensors have the fingerprint that the model took of them (unless it was
    converted to another dtype since); with a snapshot, every one is bitwise what it was.

    Args:
        model (nn.Module): A model that holds one or more prompted backbones.
        snapshot (FrozenSnapshot, optional): The state to compare with. Defaults to None.
        training (bool): Whether the model must be in training mode, so that the check of the
            modes means something. Defaults to False.

    Raises:
        FrozenTensorsChanged: Something frozen moved or could move; the message names it.
        ValueError: The model holds no prompted backbone.
    """
    for path, part in _frozen_parts(model):
        prefix = f'{path}.backbone.' if path else 'backbone.'
        # A mean teacher trains nothing, and is in eval mode when it predicts.
        trains = any(p.requires_grad for p in part.parameters())
        if training and trains and not part.training:
            raise FrozenTensorsChanged(f'{path or "the model"} is in eval mode, expected training')
        for name, param in part.backbone.named_parameters():
            if name not in part.frozen_names:
                continue
            if param.requires_grad:
                raise FrozenTensorsChanged(
                    f'{prefix}{name} is declared frozen, but its requires_grad is True')
            if param.grad is not None:
                raise FrozenTensorsChanged(f'{prefix}{name} is declared frozen, but has a gradient')
        live = {id(m) for _, m in live_modules(part.backbone)}
        for name, child in part.backbone.named_modules():
            if child.training and id(child) not in live and \
                    name not in getattr(part, 'names_with_mode', ()):
                raise FrozenTensorsChanged(
                    f'{prefix}{name} ({type(child).__name__}) is frozen, but in training mode')
    moved = [] if snapshot is None else snapshot.moved(model)
    if moved:
        raise FrozenTensorsChanged(f'frozen tensors moved: {listed(moved)}')
    for path, part in _frozen_parts(model):  # a snapshot may have been taken too late
        _check_fingerprint(path, part)


def _check_fingerprint(path: str, part: nn.Module) -> None:
    tensors = identity(frozen_tensors(part.backbone, part.frozen_names))
    if part.frozen_dtypes != {name: t.dtype for name, t in tensors.items()}:
        return
    found = bytes(fingerprint(tensors).tolist()).hex()
    if found != part.own_fingerprint:
        raise FrozenTensorsChanged(
            f'{path or "the model"}: frozen tensors are not what they were when the backbone got '
            f'its weights: expected fingerprint {part.own_fingerprint[:16]}…, got {found[:16]}…')
