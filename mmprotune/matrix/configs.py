"""Finds the configs that the hosts ship, and makes them runnable on a CPU."""
from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config

from mmprotune.config_nodes import without_pretrained
from mmprotune.engine.processes import prepare_processes

from . import LIBRARIES
from .failures import one_line
from .files import nodes, pretrained

# What a run reads of a config; the rest (schedules, evaluation) does not matter here.
KEYS = ('model', 'data_preprocessor', 'optim_wrapper', 'load_from', 'default_scope', 'custom_hooks',
        'train_dataloader')
# Regions and points that heads sample for training, thousands in most configs: as with the size of
# the images, fewer show the same.
SAMPLED = dict(num=32, num_points=512)


@dataclass
class Run:
    """Configs that ask for the same work.

    Attributes:
        key (str): Digest of model and optimizer.
        library (str): Whose configs they are.
        configs (list[str]): Their names, ``library::path``.
        cfg (Config, optional): What the first of them holds of ``KEYS``; None where it does not
            load.
        error (str): Why it does not load.
    """
    key: str
    library: str
    configs: list[str] = field(default_factory=list)
    cfg: Config | None = None
    error: str = ''


def root(library: str) -> Path:
    """The folder of the configs that a library ships."""
    return Path(importlib.util.find_spec(library).origin).parent / '.mim' / 'configs'


def config_names() -> list[str]:
    """Every config file that the three libraries ship, as ``library::path``, bases left out."""
    return [f'{library}::{path.relative_to(root(library)).as_posix()}'
            for library in LIBRARIES for path in sorted(root(library).rglob('*.py'))
            if '_base_' not in path.relative_to(root(library)).parts]


def read(name: str) -> Run | None:
    """Reads one config.

    Args:
        name (str): ``library::path``.

    Returns:
        Run, optional: A run for this config alone; None where the file defines no model.
    """
    library, _, path = name.partition('::')
    try:
        cfg = Config.fromfile(root(library) / path)
    except Exception as error:
        return Run(name, library, [name], error=one_line(error))
    if not cfg.get('model'):
        return None
    kept = {k: cfg[k] for k in KEYS if cfg.get(k) is not None}
    # A few configs of mmpretrain are only meant for its inferencers.
    kept.setdefault('default_scope', library)
    kept['train_dataloader'] = dict(dataset=(cfg.get('train_dataloader') or {}).get('dataset'))
    plain = Config(kept).to_dict()
    work = [plain.get(k) for k in KEYS[:5]]
    key = hashlib.sha256(json.dumps(work, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Run(key, library, [name], Config(plain))


def runs_of(names: Iterable[str], count: int | None = None) -> list[Run]:
    """Reads configs and puts those together that ask for the same work.

    Args:
        names (Iterable[str]): Of :func:`config_names`.
        count (int, optional): Stop at that many configs with a model. Defaults to None: all.

    Returns:
        list[Run]: In the order of ``names``.
    """
    runs: dict[str, Run] = {}
    found = 0
    for name in names:
        run = read(name)
        if run is None:
            continue
        if run.key in runs:
            runs[run.key].configs.append(name)
        else:
            runs[run.key] = run
        found += 1
        if found == count:
            break
    return list(runs.values())


def sample(names: Sequence[str], count: int, seed: int) -> list[Run]:
    """Runs of ``count`` configs drawn from ``names``."""
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    return runs_of(shuffled, count)


def runnable(cfg: Config) -> Config:
    """A copy of a stock config for one process on a CPU, small images, and no file at all.

    Args:
        cfg (Config): The config, left as it is.

    Returns:
        Config: The copy.
    """
    cfg = without_pretrained(cfg)
    if cfg.get('data_preprocessor'):  # as the Runner does it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    for path, node in nodes(cfg.model):
        if pretrained(node):
            del node['init_cfg']
        if node.get('teacher_ckpt'):
            node['teacher_ckpt'] = None
        for name, most in SAMPLED.items():
            if path and path[-1] in ('sampler', 'train_cfg') and node.get(name, 0) > most:
                node[name] = most
        if path and path[-1] == 'data_preprocessor':
            if 'size' in node:  # mmseg pads to the size of the crops
                del node['size']
                node['size_divisor'] = 1
            if cfg.default_scope != 'mmpretrain':  # the others' are about sizes
                node.pop('batch_augments', None)
    wrapper = cfg.get('optim_wrapper') or dict(optimizer=dict(type='AdamW', lr=1e-4))
    if wrapper.get('type', 'OptimWrapper') == 'AmpOptimWrapper':  # needs a GPU
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        wrapper['type'] = 'OptimWrapper'
    wrapper['accumulative_counts'] = 1
    cfg.optim_wrapper = wrapper
    prepare_processes(cfg)
    return cfg
