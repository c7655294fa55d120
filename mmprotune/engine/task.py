"""One task of a trunk, and the names by which a caller chooses tasks."""
from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import nn

from mmprotune.engine.inference import Inference
from mmprotune.errors import TrunkError, listed
from mmprotune.models.trunk import Trunk


@dataclass(eq=False)
class Task:
    """One task of a trunk.

    Attributes:
        name (str): The caller's.
        model (nn.Module): The host's own model.
        part (nn.Module): Its prompted backbone.
        trunk (Trunk): Holds the frozen tensors.
        inference (Inference): Runs the model on an image.
        lock (threading.Lock): Held while the model runs: the hosts' models and transforms do not
            promise to run in several threads at once.
    """
    name: str
    model: nn.Module
    part: nn.Module
    trunk: Trunk
    inference: Inference
    lock: threading.Lock = field(default_factory=threading.Lock)


def names_of(tasks, images: list | None, known: Collection[str]) -> list[list[str]]:
    """The names of the tasks for each image."""
    count = 1 if images is None else len(images)
    if tasks is None:
        tasks = list(known)
        if not tasks:
            raise TrunkError('there are no tasks; add(name, checkpoint) adds one')
    if isinstance(tasks, str):
        tasks = [tasks]
    if not isinstance(tasks, (list, tuple)):
        raise TrunkError(f'tasks must be names, or a list of names for each image, got {tasks!r}')
    if any(isinstance(own, (list, tuple)) for own in tasks):
        if images is None or len(tasks) != count:
            raise TrunkError(f'tasks has lists of names for {len(tasks)} images, expected '
                             f'{"one list for one image" if images is None else count}')
        names = [[own] if isinstance(own, str) else list(own) for own in tasks]
    else:
        names = [list(tasks)] * count
    for own in names:
        if not own:
            raise TrunkError('tasks is empty: expected at least one name for each image')
        if len({*map(str, own)}) < len(own):
            raise TrunkError(f'a task is named twice: {listed(map(str, own))}')
    return names


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        words in str(error) for words in ('out of memory', "can't allocate memory"))


def told(error: Exception) -> str:
    first = ' '.join(str(error).split())[:300]
    return f'ran out of memory: {first}' if is_out_of_memory(error) else \
        f'failed: {type(error).__name__}: {first}'
