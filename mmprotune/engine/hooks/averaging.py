"""Averages of a model in training (EMA, mean teachers) leave alone what is frozen.

An average of equal numbers is not bitwise the number: frozen weights would drift by rounding.
"""
from __future__ import annotations

from types import SimpleNamespace

from mmengine.hooks import Hook
from mmengine.model import BaseAveragedModel
from torch import nn

from mmprotune.checkpoints.slim import prompted_parts


def averaged_copies(hooks: list[Hook]) -> list[tuple[str, BaseAveragedModel]]:
    """The averaged copies of a model that hooks hold.

    Args:
        hooks (list[Hook]): The hooks of a Runner.

    Returns:
        list[tuple[str, BaseAveragedModel]]: Each with the hook's name and the attribute's.
    """
    return [(f'{type(hook).__name__}.{name}', value) for hook in hooks
            for name, value in vars(hook).items() if isinstance(value, BaseAveragedModel)]


def average_only_what_trains(model: nn.Module, hooks: list[Hook]) -> None:
    """Takes frozen tensors out of every average of a model; they stay what they are.

    Args:
        model (nn.Module): The model in training.
        hooks (list[Hook]): The hooks of its Runner; mmdet's ``MeanTeacherHook`` and those that
            hold a :class:`mmengine.model.BaseAveragedModel` are changed in place.
    """
    averages = [average for _, average in averaged_copies(hooks)]
    averages += [m for m in model.modules() if isinstance(m, BaseAveragedModel)]
    for average in averages:
        for name in _frozen_names(average.module):
            average.avg_parameters.pop(name, None)
    for hook in hooks:
        if _is_mean_teacher(hook) and 'momentum_update' not in vars(hook):
            hook.momentum_update = _Sparing(hook.momentum_update)


def share_frozen(model: nn.Module, hooks: list[Hook], first: bool) -> None:
    """Gives every average the frozen tensors of the model, exactly.

    Copies are made before a checkpoint is loaded; and a teacher that was drawn at random starts as
    its student, as the hook that averages it would have it.

    Args:
        model (nn.Module): The model in training.
        hooks (list[Hook]): The hooks of its Runner.
        first (bool): Whether no iteration has been made yet. Later, teachers are as they are.
    """
    for _, average in averaged_copies(hooks):
        _copy_frozen(model, average.module)
    if first and any(_is_mean_teacher(hook) for hook in hooks):
        _copy_frozen(model.student, model.teacher)


def _is_mean_teacher(hook: Hook) -> bool:
    return any(cls.__name__ == 'MeanTeacherHook' for cls in type(hook).__mro__)


def _frozen_names(model: nn.Module) -> set[str]:
    """Dotted names of everything that the prompted backbones in a model declare frozen."""
    return {f'{path}.backbone.{name}' if path else f'backbone.{name}'
            for path, part in prompted_parts(model) for name in part.frozen_names}


def _copy_frozen(source: nn.Module, target: nn.Module) -> None:
    """Copies what differs of the frozen tensors from one model to one of the same structure."""
    for (_, part), (_, copy) in zip(prompted_parts(source), prompted_parts(target)):
        theirs = copy.frozen_tensors()
        differing = [(theirs[name], tensor) for name, tensor in part.frozen_tensors().items()
                     if not tensor.equal(theirs[name].to(tensor.device))]
        for old, new in differing:
            old.data.copy_(new.data)
        if differing:
            copy.refresh_fingerprint()


class _Sparing:
    """``MeanTeacherHook.momentum_update`` for models whose frozen parameters it cannot see."""

    def __init__(self, update) -> None:
        self._update = update

    def __call__(self, model: nn.Module, momentum: float) -> None:
        self._update(SimpleNamespace(
            student=_Trained(model.student), teacher=_Trained(model.teacher)), momentum)


class _Trained:
    """A model without its frozen parameters. (Its state dict leaves them out anyway.)"""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        frozen = _frozen_names(self._model)
        return [(name, p) for name, p in self._model.named_parameters() if name not in frozen]

    def __getattr__(self, name: str):
        return getattr(self._model, name)
