from __future__ import annotations

import os

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from torch import Tensor

from mmprotune.checkpoints.loading import problems
from mmprotune.checkpoints.meta import describe_model, origin_hint
from mmprotune.checkpoints.plain import from_plain, to_plain
from mmprotune.checkpoints.resuming import check_resumable, newest, random_state, set_random_state
from mmprotune.checkpoints.slim import prompted_parts, training_names
from mmprotune.checkpoints.writing import BACKEND, remove_stale
from mmprotune.config_nodes import node_of, prompted_nodes, pull_in_files, training_patterns
from mmprotune.engine.processes import unwrapped
from mmprotune.errors import (
    CheckpointError,
    FingerprintMismatch,
    IncompleteCheckpoint,
    UnreadableCheckpoint,
)
from mmprotune.registry import HOOKS, MODELS


@HOOKS.register_module()
class PromptCheckpointHook(Hook):
    """Makes the Runner's ordinary checkpoints slim, safe and whole.

    It saves nothing itself. What ``CheckpointHook`` saves becomes tensors and plain types, which
    load under ``weights_only=True``, with a description of the prompted backbone in
    ``meta['mmprotune']``; local files are written whole or not at all; the states of the random
    generators go in, so that a resumed run (without persistent workers) goes on as the
    uninterrupted one would have.

    The config that is saved, in the checkpoints and in ``work_dir``, is made to work with them:
    a ``load_from`` that fills the frozen backbone becomes its ``frozen_from``, and pre-trained
    files that inferencers would delete move to where they stay.

    Args:
        strict (bool): Whether a prompted checkpoint must fill the whole model, head included,
            before any of it is loaded. False leaves the head to MMEngine's warnings (other
            classes, another head). Defaults to True.
        atomic (bool): Whether local checkpoints are written whole or not at all. Defaults to True.
        save_random_state (bool): Whether the random generators are saved and, on resuming, set.
            Defaults to True.
    """

    # First, so that a checkpoint is checked before any other hook uses it.
    priority = 'VERY_HIGH'

    def __init__(self, strict: bool = True, atomic: bool = True,
                 save_random_state: bool = True) -> None:
        self.strict = strict
        self.atomic = atomic
        self.save_random_state = save_random_state
        self._resumed: dict | None = None
        self._before_val: dict | None = None
        self._before_load: dict[str, Tensor] = {}

    def before_run(self, runner) -> None:
        if getattr(runner, '_resume', False) and runner._load_from is None:
            # MMEngine would trust `last_checkpoint`, which a killed process can leave empty.
            runner._load_from = newest(runner.work_dir)
        moved = pull_in_files(runner.cfg.get('model'))
        if moved:
            runner.logger.warning(f'the saved config has {", ".join(moved)}: inferencers delete it '
                                  'where it was. It belongs there in your config, too')
            _save_config_again(runner)
        if not self.atomic:
            return
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.backend_args is None and \
                    hook.file_client_args is None and '://' not in str(hook.out_dir or ''):
                hook.backend_args = dict(backend=BACKEND)

    def before_train(self, runner) -> None:
        self._keep_origin(runner)
        if not self.atomic or not is_main_process():
            return
        folders = {runner.work_dir}
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and '://' not in str(hook.out_dir or ''):
                # The hook itself adds the run's name, in its own before_train.
                folders.add(os.path.join(str(hook.out_dir or runner.work_dir),
                                         os.path.basename(runner.work_dir.rstrip(os.sep))))
        for folder in sorted(folders):
            for path in remove_stale(folder):
                runner.logger.warning(f'removed {path}: its writer was killed')

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        model = unwrapped(runner.model)
        checkpoint['meta']['mmprotune'] = describe_model(model)
        if self.save_random_state:
            checkpoint['random_state'] = self._before_val or random_state()
        for key, value in checkpoint.items():
            if not key.endswith('state_dict'):  # tensors only, with PyTorch's own metadata
                checkpoint[key] = to_plain(value, key)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        try:
            self._check(runner, checkpoint)
        except CheckpointError as error:
            hint = origin_hint(unwrapped(runner.model), checkpoint)
            raise type(error)(f'{runner._load_from}: {error}{hint}') from error.__cause__

    def _check(self, runner, checkpoint: dict) -> None:
        if not isinstance(checkpoint, dict):
            raise UnreadableCheckpoint(
                f'expected a dict with a state dict, got {type(checkpoint).__name__}')
        for key, value in checkpoint.items():
            if not str(key).endswith('state_dict') and not isinstance(value, Tensor):
                checkpoint[key] = from_plain(value, str(key))
        resumes = getattr(runner, '_resume', False)
        if resumes:
            check_resumable(checkpoint)
        model = unwrapped(runner.model)
        state_dict = checkpoint.get('state_dict', checkpoint)
        # Another frozen backbone is refused here, where the file is known, strict or not.
        problem = problems(model, state_dict) if isinstance(state_dict, dict) else \
            f'expected a state dict, got {type(state_dict).__name__}'
        if problem is not None and self.strict:
            raise IncompleteCheckpoint(
                f'{problem}. Nothing was loaded; '
                "dict(type='mmprotune.PromptCheckpointHook', strict=False) loads what fits")
        if self.save_random_state and resumes:
            self._resumed = checkpoint.get('random_state')
        self._before_load = {} if resumes else {
            path: part.frozen_fingerprint.cpu().clone() for path, part in prompted_parts(model)}

    def _keep_origin(self, runner) -> None:
        """Notes where the frozen backbones came from, when ``load_from`` has filled them.

        Slim checkpoints do not hold them, so whatever is built of the saved config must get them
        by itself. Whether it does is tried out here, before any training is spent.
        """
        before, self._before_load = self._before_load, {}
        parts = dict(prompted_parts(unwrapped(runner.model)))
        changed = [path for path, sha in before.items()
                   if path in parts and not torch.equal(sha, parts[path].frozen_fingerprint.cpu())]
        if not changed:
            return
        source = str(runner._load_from)
        if '://' not in source:
            source = os.path.abspath(os.path.expanduser(source))
        nodes = prompted_nodes(runner.cfg.get('model'))
        for path in changed:
            part, node = parts[path], node_of(path, nodes)
            part.frozen_from = source
            if node is None:
                runner.logger.warning(f'{path} was filled by load_from, but the config has no '
                                      f'model.{path} that could say so in frozen_from={source}')
                continue
            node['frozen_from'] = source
            patterns = training_patterns(node, training_names(part))
            if patterns:  # load_from also fills what the pre-trained file had left to train
                node['trainable'] = patterns
            _try_out(node, part, path, source)
            runner.logger.info(f'the frozen backbone is the one of load_from: the saved config has '
                               f'model.{path}.frozen_from={source}')
        _save_config_again(runner)

    def before_train_epoch(self, runner) -> None:
        if self._resumed is not None:
            try:
                set_random_state(self._resumed)
            except Exception as error:
                raise UnreadableCheckpoint(f'{runner._load_from}: random_state is malformed: '
                                           f'{type(error).__name__}: {error}') from error
            self._resumed = None
            # The loader was built before the checkpoint's seed was known; the order of the images
            # goes by it.
            loader = runner.train_dataloader
            for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
                if hasattr(sampler, 'seed'):
                    sampler.seed = runner.seed

    # Validation draws random numbers too. Training goes on as if it had not, so that a run
    # resumed from the checkpoint saved before it sees the same ones.
    def before_val(self, runner) -> None:
        if self.save_random_state:
            self._before_val = random_state()

    def after_val(self, runner) -> None:
        if self._before_val is not None:
            set_random_state(self._before_val)
            self._before_val = None


def _save_config_again(runner) -> None:
    """Writes a config that was changed to where the Runner had written it: file and meta."""
    runner.dump_config()
    runner.message_hub.update_info('cfg', runner.cfg.pretty_text)


def _try_out(node: dict, part, path: str, source: str) -> None:
    """Raises when a prompted backbone's config does not lead to the frozen tensors that it has."""
    cfg = dict(node, prompt=None)
    if cfg.get('backbone_dtype') is None:
        cfg['lean'] = False
    state = random_state()
    try:
        found = MODELS.build(cfg).frozen_fingerprint
    finally:
        set_random_state(state)
    if not torch.equal(found.cpu(), part.frozen_fingerprint.cpu()):
        raise FingerprintMismatch(
            f'load_from={source} filled the frozen backbone, but model.{path}.frozen_from={source} '
            'fills it otherwise, and the slim checkpoints of this run could not be used. Save its '
            f'tensors in a file of their own, and name that in model.{path}.backbone.init_cfg')
