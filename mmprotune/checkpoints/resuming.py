"""Which checkpoint a run goes on from, and the state of the random generators in it."""
from __future__ import annotations

import logging
import os
import random
import re

import numpy as np
import torch
from mmengine.logging import print_log

from mmprotune.errors import IncompleteCheckpoint, UnreadableCheckpoint

from .reading import read


def newest(work_dir: str | os.PathLike, to_resume: bool = True) -> str | None:
    """The newest whole checkpoint of a run.

    That is the one which ``last_checkpoint`` names, or one saved after it: a process can die
    between saving a checkpoint and noting its name, and while it notes it. Files that are broken
    are passed over with a warning.

    Args:
        work_dir (str | os.PathLike): Of the run.
        to_resume (bool): Whether training is to go on from it; else only its weights are wanted.
            Defaults to True.

    Returns:
        str, optional: Path of the checkpoint; None where there is none.

    Raises:
        IncompleteCheckpoint: ``to_resume``, and the newest one was saved without an optimizer.
            Going on from an older one, or training anew, would overwrite it.
        UnreadableCheckpoint: There are some, and all of them are broken.
    """
    work_dir = os.fspath(work_dir)
    note = os.path.join(work_dir, 'last_checkpoint')
    last = ''
    if os.path.isfile(note):
        with open(note, encoding='utf-8', errors='replace') as file:
            last = file.read().strip()
    files = {}
    for folder in {work_dir, os.path.dirname(last) or work_dir}:
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                files.update((entry.path, _age(entry.path)) for entry in entries if entry.is_file()
                             and re.fullmatch(r'(?!best_)[^.].*\d\.pth', entry.name))
    order = sorted(files, key=files.get, reverse=True)
    if os.path.isfile(last):
        # Later in time and in training; a copied folder has times in any order.
        noted = _age(last)
        order = [p for p in order if all(a > b for a, b in zip(files[p], noted))] + [last] + [
            p for p in order if p != last]
    broken = None
    for path in dict.fromkeys(order):
        try:
            checkpoint = read(path)
            if not isinstance(checkpoint, dict):
                raise UnreadableCheckpoint(f'{path}: expected a dict with a state dict, got '
                                           f'{type(checkpoint).__name__}')
        except UnreadableCheckpoint as error:
            broken = broken or error
            print_log(f'passed over: {error}', logger='current', level=logging.WARNING)
            continue
        if 'optimizer' in checkpoint:
            return path
        # Not every file with a number is the run's: pre-trained and published ones may lie here.
        if path == last or re.fullmatch(r'(epoch|iter)_\d+\.pth', os.path.basename(path)):
            if not to_resume:
                return path
            raise IncompleteCheckpoint(
                f'{path}: it holds no optimizer, so training cannot be resumed from it, and would '
                f'overwrite it: start in another work_dir, with load_from={path} for its weights')
    if broken is not None:
        raise broken
    return None


def _age(path: str) -> tuple[int, int]:
    """Time of the last change in nanoseconds, and the number at the end of the name."""
    number = re.search(r'(\d+)\.pth$', path)
    return os.stat(path).st_mtime_ns, int(number[1]) if number else -1


def check_resumable(checkpoint: dict) -> None:
    """Raises where MMEngine would fail halfway, or go on with a new optimizer and say nothing."""
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or not all(
            isinstance(meta.get(key), int) for key in ('epoch', 'iter')):
        raise IncompleteCheckpoint('it does not say how far training had come')
    missing = [key for key in ('optimizer', 'message_hub', 'state_dict')
               if not isinstance(checkpoint.get(key), dict)]
    if missing:
        raise IncompleteCheckpoint(f'it holds no {" and no ".join(missing)}, so training cannot be '
                                   'resumed from it; load_from without resume takes its weights')


def random_state() -> dict:
    """States of Python's, NumPy's and PyTorch's generators, as tensors and plain types."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = dict(
        python=(version, tuple(internal), gauss),
        numpy=(kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        torch=torch.get_rng_state())
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict) -> None:
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and len(state['cuda']) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda']])
