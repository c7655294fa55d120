"""Building the Runner of a config."""
from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmprotune.config_nodes import type_name
from mmprotune.engine.config import set_prompt_rates
from mmprotune.engine.processes import prepare_processes


def build_runner(cfg: Config) -> Runner:
    """Builds the Runner of a config, on whatever there is: GPUs, one CPU, several CPU processes.

    Args:
        cfg (Config): The config; ``launcher`` and ``work_dir`` are set. Changed in place.

    Returns:
        Runner: The Runner. It may be of the type that ``cfg.runner_type`` names.
    """
    notices = prepare_processes(cfg)
    rates = set_prompt_rates(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _set_dataloader_defaults(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.logger.addFilter(_OneFrozenNotice())
    check_data(runner)
    for notice in notices:
        runner.logger.warning(notice)
    for sentence in rates:
        runner.logger.info(sentence)
    return runner


def check_data(runner: Runner) -> None:
    """Puts every data loader's transforms into a :class:`CheckedPipeline`.

    Not into the config that the Runner has written to its folder: inferencers look up the loading
    transform in that.

    Args:
        runner (Runner): A new one, whose data loaders have not been built.
    """
    for loader in (runner._train_dataloader, runner._val_dataloader, runner._test_dataloader):
        if isinstance(loader, dict):
            for dataset in _leaves(loader.get('dataset')):
                pipeline = dataset.get('pipeline')
                if pipeline and not (isinstance(pipeline[0], dict) and
                                     type_name(pipeline[0]) == 'CheckedPipeline'):
                    dataset['pipeline'] = [
                        dict(type='mmprotune.CheckedPipeline', transforms=pipeline)]


def _leaves(dataset: object) -> Iterator[dict]:
    """The datasets inside wrappers; a wrapper's own transforms mix several images."""
    if isinstance(dataset, dict):
        inner = [dataset[key] for key in ('dataset', 'datasets') if key in dataset]
        if not inner:
            yield dataset
        for one in inner:
            yield from _leaves(one)
    elif isinstance(dataset, (list, tuple)):
        for one in dataset:
            yield from _leaves(one)


def _set_dataloader_defaults(cfg: Config) -> None:
    """mmpretrain's own tools add these to its data loaders; its configs count on it."""
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(key)
        if loader:
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', bool(loader.get('num_workers', 0)))
            loader.setdefault('collate_fn', dict(type='default_collate'))


class _OneFrozenNotice(logging.Filter):
    """One line instead of one warning for each frozen parameter.

    With a ``paramwise_cfg``, MMEngine's optimizer constructor warns for every parameter that does
    not train. In a prompted model that is the whole backbone, and on purpose.
    """
    _pattern = re.compile(r'is skipped since its\s+requires_grad=False')

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not self._pattern.search(record.getMessage()):
            return True
        if self._told:
            return False
        self._told = True
        record.msg, record.args = 'optimizer: frozen parameters are left out', ()
        record.levelno, record.levelname = logging.INFO, 'INFO'
        return True
