"""One frozen backbone, many tasks."""
from __future__ import annotations

import contextlib
import gc
import os
import threading
import traceback
from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from mmprotune.checkpoints.convert import build_model
from mmprotune.checkpoints.loading import fill
from mmprotune.checkpoints.reading import read, state_dict_of
from mmprotune.checkpoints.slim import FINGERPRINT, hex_of, prompted_parts
from mmprotune.engine.inference import (
    Inference,
    check_host,
    check_image,
    config_of,
    usable_device,
)
from mmprotune.engine.task import Task, is_out_of_memory, names_of, told
from mmprotune.engine.trunk_report import TrunkReport, report_on
from mmprotune.errors import DoesNotFit, TaskFailed, TrunkError, listed
from mmprotune.models.session import Session
from mmprotune.models.sharing import install, shared_paths
from mmprotune.models.trunk import Trunk


class FrozenTrunk:
    """Several models tuned on one frozen backbone, with the backbone in memory once.

    Each task is what its own checkpoint says: a detector, a segmentor, a classifier. Tasks whose
    backbones have one fingerprint hold the same frozen tensors; a task with another backbone gets a
    trunk of its own. Of one image, layers that would compute the same for several tasks run once
    (:mod:`mmprotune.models.session`), to results that are bitwise those of each model alone.

    May be used from several threads; tasks may be added and removed meanwhile. One task runs in one
    thread at a time.

    Args:
        device (str | torch.device): Where all tasks are. Defaults to None: a GPU where there is
            one, else the CPU.

    Raises:
        TrunkError: There is no such device.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = usable_device(device)
        self._tasks: dict[str, Task] = {}  # replaced, never changed: calls keep the one they saw
        self._paths: dict[tuple[Task, Task], frozenset[str]] = {}
        self._lock = threading.Lock()  # of the two above, and quickly given back
        self._adding = threading.Lock()  # building a model takes seconds

    # --- tasks --------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order in which they came."""
        return list(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def model(self, name: str) -> nn.Module:
        """The host's own model of a task."""
        return self._find(self._tasks, name).model

    def add(self, name: str, checkpoint: str | os.PathLike,
            config: Config | str | os.PathLike | None = None) -> None:
        """Adds a task, or leaves everything as it was.

        Where the trunk of its fingerprint is here already, the backbone's pre-trained file is not
        read, nor need it be there.

        Args:
            name (str): A new name.
            checkpoint (str | os.PathLike): Local file, slim or full, of a prompted model.
            config (Config | str | os.PathLike, optional): Its config. Defaults to None: the one in
                the checkpoint, which is read, not run.

        Raises:
            TrunkError: The name is taken, or there is no usable config.
            CheckpointError: The file cannot be read, or does not fit the config's model.
            PretrainedFileError: The first task of a trunk, and its backbone cannot be had.
            FileNotFoundError: No such file.
        """
        if not isinstance(name, str) or not name:
            raise TrunkError(f'name must be a word, got {name!r}')
        with self._adding:
            if name in self._tasks:
                raise TrunkError(f'there is a task {name!r} already; remove it first, or take '
                                 'another name')
            path = os.fspath(checkpoint)
            loaded = read(path)
            state_dict_of(loaded, path)
            cfg = config_of(loaded, path, config, "add(name, checkpoint, config='….py')")
            try:
                task = self._build(name, path, loaded, cfg)
            except TrunkError as error:
                raise TrunkError(f'{path}: {error}') from error
            with self._lock:
                self._tasks = {**self._tasks, name: task}

    def remove(self, name: str) -> None:
        """Removes a task and gives its memory back; the last one of a trunk takes it along. Calls
        that run meanwhile end as they would have.

        Raises:
            TrunkError: There is no such task.
        """
        with self._lock:
            task = self._find(self._tasks, name)
            self._tasks = {n: t for n, t in self._tasks.items() if t is not task}
            self._paths = {pair: paths for pair, paths in self._paths.items() if task not in pair}
            del task
        gc.collect()  # hooks and lean layers refer to each other
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()

    def _build(self, name: str, path: str, loaded: dict, cfg: Config) -> Task:
        state_dict = state_dict_of(loaded, path)
        roots = [key[:-len(FINGERPRINT)] for key in state_dict
                 if key.rpartition('.')[2] == FINGERPRINT]
        trunk = None
        if len(roots) == 1:
            trunk = self._trunks().get(hex_of(state_dict[roots[0] + FINGERPRINT]))
        check_host(cfg)
        if not cfg.get('model'):
            raise TrunkError('the config has no model')
        model = None
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            # Weights that are stored in another precision are converted after they are loaded.
            if trunk is not None and 'backbone_dtype' not in str(cfg.model):
                slim = dict(state_dict=trunk.without_frozen(state_dict, roots[0]))
                # A class that names its tensors otherwise reads the file, as the first one does.
                with contextlib.suppress(DoesNotFit), trunk.filling():
                    model = build_model(cfg)
                    loaded = {**loaded, **slim}
            if model is None:
                model = build_model(cfg)
            fill(model, loaded, path)
            inference = Inference(model, cfg)
        parts = [part for _, part in prompted_parts(model)]
        if len(parts) != 1:
            raise TrunkError(f'the model has {len(parts)} prompted backbones, expected one')
        part = parts[0]
        part.require_weights()
        trunk = self._trunks().get(part.own_fingerprint)
        if trunk is not None:
            trunk.share(part)
        model.to(self.device).eval()
        if trunk is None:
            trunk = Trunk(part)
        if not trunk.is_shared_by(part):
            raise TrunkError('its frozen tensors could not be put into the memory of the trunk')
        meta = (loaded.get('meta') or {}).get('dataset_meta') if 'state_dict' in loaded else None
        if isinstance(meta, dict):
            model.dataset_meta = {str(key).lower(): value for key, value in meta.items()}
        model.cfg = cfg
        return Task(name, model, part, trunk, inference)

    def _trunks(self) -> dict[str, Trunk]:
        return {task.trunk.key: task.trunk for task in self._tasks.values()}

    @staticmethod
    def _find(tasks: dict[str, Task], name: str) -> Task:
        if not isinstance(name, str) or name not in tasks:
            raise TrunkError(f'there is no task {name!r}; there are {listed(tasks)}')
        return tasks[name]

    # --- running ------------------------------------------------------------------------------

    def __call__(self, images, tasks: str | Sequence[str] | Sequence[Sequence[str]] | None = None):
        """Runs tasks on images, one image after the other.

        Args:
            images (str | Path | numpy.ndarray | list): A path, or an array of shape (H, W, 3), BGR;
                or several of them.
            tasks (str | list[str] | list[list[str]], optional): Names for all images, or a list of
                names for each. Defaults to None: all.

        Returns:
            dict | list[dict]: Results by task name, for each image where there are several:
            ``DetDataSample``, ``SegDataSample`` or mmpretrain's ``DataSample``.

        Raises:
            TrunkError: A task is unknown, or was moved to another device. Nothing was run.
            DataError: An image is none. Nothing was run.
            TaskFailed: A task ran out of memory, or failed otherwise. The results of the others are
                in the error's ``results``.
        """
        known = self._tasks
        several = isinstance(images, (list, tuple))
        images = list(images) if several else [images]
        names = names_of(tasks, images if several else None, known)
        chosen = [[self._find(known, name) for name in own] for own in names]
        for task in {task for own in chosen for task in own}:
            self._check_device(task)
        images = [check_image(image) for image in images]
        failed: dict[str, Exception] = {}
        # Versions, by which changes in place are noticed, are not counted in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            results = [self._run(image, own, failed) for image, own in zip(images, chosen)]
        results = results if several else results[0]
        if failed:
            what = '; '.join(f'task {name!r} {told(error)}' for name, error in failed.items())
            raise TaskFailed(f"{what}. The other tasks have run: see the error's `results`",
                             results) from next(iter(failed.values()))
        return results

    def _run(self, image: str | np.ndarray, tasks: list[Task],
             failed: dict[str, Exception]) -> dict:
        session = self._session(tasks) if len(tasks) > 1 else None
        found = {}
        for task in tasks:
            shared = contextlib.nullcontext() if session is None else session.task(task.name)
            try:
                with task.lock, shared:
                    found[task.name] = task.inference(image)
            except Exception as error:  # whatever a model raises
                traceback.clear_frames(error.__traceback__)  # they hold its tensors
                failed.setdefault(task.name, error)
                if self.device.type == 'cuda' and is_out_of_memory(error):
                    torch.cuda.empty_cache()
        return found

    def _session(self, tasks: list[Task]) -> Session:
        of = {task.name: task for task in tasks}
        return Session({task.name: task.part for task in tasks},
                       lambda first, second: self._shared(of[first], of[second]))

    def _shared(self, first: Task, second: Task) -> frozenset[str]:
        """What two tasks may share; looked up once."""
        if first.trunk is not second.trunk:
            return frozenset()
        found = self._paths.get((first, second))
        if found is None:
            with self._lock:
                found = shared_paths(first.part.backbone, second.part.backbone)
                for task in (first, second):
                    install(task.part.backbone, found)
                if {first, second} <= set(self._tasks.values()):  # not removed meanwhile
                    self._paths = {**self._paths, (first, second): found, (second, first): found}
        return found

    def _check_device(self, task: Task) -> None:
        devices = {str(tensor.device) for tensor in task.model.parameters()} - {str(self.device)}
        if devices:
            raise TrunkError(f'task {task.name!r} is on {listed(sorted(devices))}, expected all of '
                             f'it on {self.device}: one FrozenTrunk has one device')

    # --- saying what is shared ----------------------------------------------------------------

    def report(self) -> TrunkReport:
        """Says what is shared and what is not, and why. Runs every pair of tasks on noise."""
        return report_on(list(self._tasks.values()), self._session)

    def __str__(self) -> str:
        return str(self.report())
