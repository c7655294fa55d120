"""Checks ``tools/train.py --protune`` on every config that mmdet, mmseg and mmpretrain ship.

A config's stock model is built first, initialised, and computes its losses on noise images, under
limits of memory and time. Where that works, ``mmprotune.protune(cfg)`` is tried under the same
limits: the model builds; ``init_weights()`` and a training step move nothing frozen (SHA-256 of
every tensor); every prompt parameter has the head's rate and gets a gradient once the prompts are
awake. Where that fails, the stock model has to take a training step as well, or else
the failure is not counted. The files that configs name are not downloaded: the stock backbone's own
random weights, a little moved and with norms that fit them, are written to a file that takes their
place.

Each of these runs in a forked process of its own. Configs with the same model and the same
optimizer share one run. With --log, results are kept in a file, and a command that was cut off
goes on where it was.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import fnmatch
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmprotune import __version__, protune
from mmprotune.config_nodes import without_pretrained
from mmprotune.engine.processes import prepare_processes
from mmprotune.freezing import FrozenSnapshot, audit
from mmprotune.models import PromptedBackbone
from mmprotune.testing.noise_batch import noise_batch

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
# What a run reads of a config; the rest (schedules, evaluation) does not matter here.
KEYS = ('model', 'data_preprocessor', 'optim_wrapper', 'load_from', 'default_scope', 'custom_hooks',
        'train_dataloader')
# Sides of images to try, in pixels: the first that the stock model takes a step with is used.
SIZES = dict(mmdet=(128, 320, 512), mmseg=(64, 128, 512), mmpretrain=(64, 224, 384))
BATCH_SIZE = 2
OWN_SIZE = re.compile(r'"(?:img|image|input|pretrain_img)_size": \[?(\d+)')
# Regions and points that heads sample for training, thousands in most configs: as with the size of
# the images, fewer show the same.
SAMPLED = dict(num=32, num_points=512)
# Which of a config's keys names the pre-trained file of its backbone.
NO_FILE = 'none'


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


@dataclass(frozen=True)
class Limits:
    """What one process may take.

    Attributes:
        memory (float): Address space in GB (10^9 bytes).
        seconds (float): Processor time, so that a busy machine gives the same verdicts as an idle
            one; by the clock it may be ten times as much.
    """
    memory: float = 9
    seconds: float = 180


# --- the configs -----------------------------------------------------------------------------


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
        return Run(name, library, [name], error=_one_line(error))
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


# --- one config ------------------------------------------------------------------------------


def _nodes(node: object, path: tuple = ()) -> Iterator[tuple[tuple, dict]]:
    """Every dict inside nested dicts and lists with its path, outermost first."""
    if isinstance(node, dict):
        yield path, node
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in list(items):
        if isinstance(child, (dict, list, tuple)):
            yield from _nodes(child, (*path, key))


def _backbone(model: dict) -> dict | None:
    """The config of the backbone: ``model.backbone``, else the first one further in."""
    if isinstance(model.get('backbone'), dict):
        return model['backbone']
    return next((node for path, node in _nodes(model) if path and path[-1] == 'backbone'), None)


def _pretrained(node: dict) -> dict | None:
    """The part of a node's ``init_cfg`` that names a file; PVT's has no type."""
    init_cfg = node.get('init_cfg')
    parts = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    return next((p for p in parts
                 if isinstance(p, dict) and p.get('type', 'Pretrained') == 'Pretrained'), None)


def _file_node(backbone: dict) -> tuple[tuple, dict] | None:
    """The outermost dict in a backbone whose ``init_cfg`` names a file, and its path."""
    return next((found for found in _nodes(backbone) if _pretrained(found[1])), None)


def file_key(cfg: Config) -> str:
    """Which key of a config names the file that its backbone starts from.

    Args:
        cfg (Config): A stock config.

    Returns:
        str: 'init_cfg', 'pretrained' or 'checkpoint_path' of the backbone, 'backbone_cfg.init_cfg'
        or the like of a network inside it, 'model.pretrained', 'load_from', or ``NO_FILE``.
    """
    backbone = _backbone(cfg.model) or {}
    found = _file_node(backbone)
    if found:
        return '.'.join([*map(str, found[0]), 'init_cfg'])
    for key in ('checkpoint_path', 'pretrained'):
        if backbone.get(key):
            return key
    if cfg.model.get('pretrained'):
        return 'model.pretrained'
    return 'load_from' if cfg.get('load_from') else NO_FILE


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
    for path, node in _nodes(cfg.model):
        if _pretrained(node):
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


def point(cfg: Config, original: Config, folder: Path) -> dict:
    """Lets a config name the files in ``folder`` where the original one names its own.

    Args:
        cfg (Config): Of :func:`runnable`; changed in place.
        original (Config): The stock config.
        folder (Path): Holds the files that :func:`check_stock` wrote.

    Returns:
        dict: Options for ``protune``: ``frozen_from`` where the original names no file.
    """
    backbone, was = _backbone(cfg.model), _backbone(original.model)
    if backbone is None:
        return {}
    options = {}
    key, file = file_key(original), str(folder / 'backbone.pth')
    if key.endswith('init_cfg'):
        node, (path, named) = backbone, _file_node(was)
        for part in path:
            node = node[part]
        node['init_cfg'] = copy.deepcopy(named['init_cfg'])
        _pretrained(node)['checkpoint'] = file
    elif key in ('pretrained', 'checkpoint_path'):
        if 'TIMM' in str(backbone['type']):
            key = 'checkpoint_path'  # pretrained=True asks timm to download
        backbone[key] = file
    elif key == 'model.pretrained':
        cfg.model['pretrained'] = file
    elif key == NO_FILE:
        options['frozen_from'] = file  # which backbones take that forbid an init_cfg, too
    if original.get('load_from'):
        cfg.load_from = str(folder / 'model.pth')
    # The files hold the names of the class itself, not those of another library's weights.
    for path, node in _nodes(cfg.model):
        if 'convert_weights' in node or path and path[-1] == 'backbone' and _converts(node):
            node['convert_weights'] = False
    return options


def _converts(backbone: dict) -> bool:
    cls = MODELS.get(str(backbone.get('type')))
    return cls is not None and 'convert_weights' in inspect.signature(cls.__init__).parameters


def _named(model: nn.Module, name: str) -> nn.Module | None:
    """The first submodule of that name, at any depth."""
    return next((m for n, m in model.named_modules() if n.rpartition('.')[2] == name), None)


def write_files(model: nn.Module, original: Config, folder: Path) -> None:
    """Writes the weights of a stock model where a run's config will look.

    Args:
        model (nn.Module): The stock model.
        original (Config): Its config.
        folder (Path): Where to.
    """
    backbone = _named(model, 'backbone')
    if backbone is None:
        return
    path, node = _file_node(_backbone(original.model) or {}) or ((), {})
    if path:  # the file is that of a network inside
        backbone = _named(backbone, path[-1].replace('_cfg', ''))
    state = backbone.state_dict()
    prefix = (_pretrained(node) or {}).get('prefix') or ''
    # Loaders differ in the names they look for; the file has all of them.
    prefixes = {'', 'backbone.', prefix.rstrip('.') + '.' if prefix else ''}
    if 'TIMM' in type(backbone).__name__ and file_key(original) != NO_FILE:
        # timm loads into its own model, and strictly.
        state, prefixes = {k.partition('.')[2]: v for k, v in state.items()}, {''}
    torch.save({p + k: v for p in sorted(prefixes) for k, v in state.items()},
               folder / 'backbone.pth')
    if original.get('load_from'):
        torch.save(dict(state_dict=model.state_dict()), folder / 'model.pth')


def _build(cfg: Config) -> nn.Module:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    init_default_scope(cfg.default_scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def _step(model: nn.Module, cfg: Config, size: int, wrapper) -> bool:
    """One training step as the Runner takes it; whether its losses are finite."""
    hub = MessageHub.get_current_instance()
    for key, value in dict(iter=0, epoch=0, max_iters=1, max_epochs=1).items():
        hub.update_info(key, value)  # some heads warm up by it
    batch = noise_batch(cfg, size, BATCH_SIZE, np.random.default_rng(0))
    return all(bool(value.isfinite().all()) for value in model.train_step(batch, wrapper).values())


class _LossesAlone:
    """Takes the place of an optimizer's wrapper in a step that computes losses and no more."""

    @staticmethod
    def optim_context(model: nn.Module) -> contextlib.AbstractContextManager:
        return torch.no_grad()

    @staticmethod
    def update_params(loss: torch.Tensor) -> None:
        pass


def _stock(run: Run) -> tuple[nn.Module, Config]:
    """The stock model of a run with its weights, and the config that it was built from."""
    cfg = runnable(run.cfg)
    model = _build(cfg)
    if hasattr(model, 'init_weights'):
        model.init_weights()
    return model, cfg


def check_stock(run: Run, folder: Path) -> dict:
    """Builds the stock model, computes its losses and writes its files.

    The backbone's weights are moved a little before, so that a constant that is set anew (zero
    biases, norms) counts as moved weights. The statistics of the norms are those of the very
    images: with others, features and gradients of random weights vanish in deep networks.

    Args:
        run (Run): The run.
        folder (Path): For the files.

    Returns:
        dict: ``size`` of the images that it takes, ``larger`` ones, and whether its losses are
        ``finite``.
    """
    model, cfg = _stock(run)
    backbone = _named(model, 'backbone')
    with torch.no_grad():
        for tensor in () if backbone is None else backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.01)
                if tensor.dim() < 2 or not tensor.any():  # all of a kernel would shift its output
                    tensor.add_(1e-3)
    text = json.dumps(run.cfg.model.to_dict(), default=str)
    first, *others = SIZES[run.cfg.default_scope]
    sizes = [first, *map(int, OWN_SIZE.findall(text)), *others]
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.register_forward_hook(_forget_few_values)
    failures = []
    for size in dict.fromkeys(sizes):
        model.train()
        for norm in norms:  # those of a backbone, too, which many detectors keep in eval mode
            norm.reset_running_stats()
            norm.train()
            norm.momentum = None
        try:
            finite = _step(model, cfg, size, _LossesAlone())
        except Exception as error:
            failures.append(error)
            if _out_of_memory(error) or isinstance(error, NotImplementedError):
                raise
        else:
            write_files(model, run.cfg, folder)
            return dict(size=size, larger=[s for s in sizes if s > size], finite=finite)
    raise failures[-1]


def _forget_few_values(norm: nn.Module, args: tuple, output: torch.Tensor) -> None:
    """Forward hook: of a few values, whatever is a little different would be far out."""
    if args[0].numel() < 16 * norm.num_features:
        norm.reset_running_stats()


def check_stock_step(run: Run, folder: Path, stock: dict) -> dict:
    """Takes a whole training step with the stock model, as the prompted one had to.

    Args:
        run (Run): The run.
        folder (Path): Not used.
        stock (dict): What :func:`check_stock` returned.
    """
    model, cfg = _stock(run)
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    model.train()
    _step(model, cfg, stock['size'], wrapper)
    return {}


def check_prompted(run: Run, folder: Path, stock: dict) -> dict:
    """Builds the prompted model as ``--protune`` does and holds it to its promises.

    Args:
        run (Run): The run.
        folder (Path): Holds the files of the stock model.
        stock (dict): What :func:`check_stock` returned.

    Returns:
        dict: ``faults``: broken promises in words; ``prompts``: number of stages that have one;
        ``prompt_parameters``.
    """
    cfg = runnable(run.cfg)
    options = point(cfg, run.cfg, folder)
    named = 'prompt' in json.dumps((cfg.optim_wrapper.get('paramwise_cfg') or {}), default=str)
    protune(cfg, **options)
    prepare_processes(cfg)
    # The order of the Runner: model, optimizer, init_weights, load_from.
    model = _build(cfg)
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    faults = []
    snapshot = FrozenSnapshot(model)

    def compare(after: str) -> None:
        nonlocal snapshot
        moved = snapshot.moved(model)
        if moved:
            faults.append(f'{after} moved {len(moved)} of {len(snapshot.digests)} frozen tensors: '
                          f'{", ".join(moved[:2])}')
            snapshot = FrozenSnapshot(model)

    model.init_weights()
    compare('init_weights()')
    if cfg.get('load_from'):
        # Of the same weights, which therefore stay.
        load_checkpoint(model, cfg.load_from, map_location='cpu')
        compare('load_from')

    prompts = _prompt_parameters(model)
    if not prompts:
        raise AssertionError('no prompt trains')
    if not named:
        paramwise = cfg.optim_wrapper.get('paramwise_cfg') or {}
        every_bias = (paramwise.get('custom_keys') or {}).get('bias') or {}
        faults += wrong_rates(wrapper.optimizer, prompts,
                              every_bias.get('lr_mult') or paramwise.get('bias_lr_mult') or 1.,
                              head_rate(wrapper.optimizer, model))
    # Prompts start at zero, and so do some heads, which lets no gradient through.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    without = set(prompts)
    wrapper.optimizer.register_step_pre_hook(lambda *_: without.difference_update(
        n for n, p in prompts.items() if p.grad is not None and p.grad.count_nonzero()))
    model.train()
    finite = _step(model, cfg, stock['size'], wrapper)
    compare('the step')
    # The deepest features of small images have few pixels, or one, and may all be dead.
    for size in stock['larger'][:1] if without else ():
        with contextlib.suppress(Exception):
            _step(model, cfg, size, wrapper)
            compare('another step')
    if stock['finite'] and not finite:
        faults.append('the loss is not finite, though that of the stock model is')
    if without:
        faults.append(f'no gradient for {len(without)} of {len(prompts)} prompt parameters: '
                      f'{", ".join(sorted(without)[:2])}')
    try:
        audit(model)
    except Exception as error:
        faults.append(_one_line(error))
    return dict(faults=faults, prompts=sum(n.endswith('expand.weight') for n in prompts),
                prompt_parameters=sum(p.numel() for p in prompts.values()))


def _prompt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the prompts that train: a teacher's or an average's do not."""
    return {f'{path}.prompts.{name}': parameter
            for path, part in model.named_modules() if isinstance(part, PromptedBackbone)
            for name, parameter in part.prompts.named_parameters() if parameter.requires_grad}


def head_rate(optimizer: torch.optim.Optimizer, model: nn.Module) -> float | None:
    """The learning rate of most weights in what is called a head; None without one."""
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    counts: collections.Counter = collections.Counter()
    for name, parameter in model.named_parameters():
        if 'head' in name and 'backbone' not in name and id(parameter) in rates:
            counts[rates[id(parameter)]] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def wrong_rates(optimizer: torch.optim.Optimizer, prompts: dict[str, nn.Parameter],
                bias_lr_mult: float = 1., rate_of_heads: float | None = None) -> list[str]:
    """Says which prompts do not train at the head's rate.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        prompts (dict[str, nn.Parameter]): The prompts' parameters by name.
        bias_lr_mult (float): What a config gives all biases, the head's too. Defaults to 1.
        rate_of_heads (float, optional): Of :func:`head_rate`. Defaults to None: the base rate.

    Returns:
        list[str]: At most one sentence.
    """
    base = optimizer.defaults['lr'] if rate_of_heads is None else rate_of_heads
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    allowed = {n: {base, base * bias_lr_mult} if n.endswith('bias') else {base} for n in prompts}
    wrong = {n: rates.get(id(p)) for n, p in prompts.items() if rates.get(id(p)) not in allowed[n]}
    if not wrong:
        return []
    name, rate = next(iter(wrong.items()))
    told = 'is not in the optimizer' if rate is None else f'trains at {rate:g}'
    return [f"the rate of {len(wrong)} of {len(prompts)} prompt parameters is not the head's "
            f'rate {base:g}: {name} {told}']


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(
        re.search(r"can't allocate memory|Cannot allocate memory|out of memory|bad_alloc",
                  str(error)))


def _one_line(error: BaseException | str) -> str:
    text = error if isinstance(error, str) else f'{type(error).__name__}: {error}'
    text = re.sub(r'/\S*/(?:site-packages|config_matrix_\w+)/', '', text)  # this machine's folders
    return re.sub(r'\s+', ' ', text).strip()[:300]


# --- processes -------------------------------------------------------------------------------


def _in_child(check: Callable, run: Run, limits: Limits, out: Path, args: tuple) -> None:
    """What a forked process does: one check, its result in the file ``out``."""
    log = os.open(out.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, 'w')  # a test's may be others
    size = int(limits.memory * 1e9)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    seconds = math.ceil(limits.seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    os.chdir(root(run.library).parent)  # some configs name others as configs/…
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    try:
        result = check(run, *args)
    except Exception as error:
        told = f'not within {limits.memory:g} GB' if _out_of_memory(error) else _one_line(error)
        result = dict(error=told, traceback=traceback.format_exc()[-6000:])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    result.update(peak_mb=usage.ru_maxrss // 1024, seconds=usage.ru_utime + usage.ru_stime)
    out.write_text(json.dumps(result, default=str))


class _Job:
    """A run at work: its stock model, then the prompted one, a process each; where that one fails,
    a whole step of the stock model."""

    def __init__(self, run: Run, limits: Limits) -> None:
        self.run = run
        self.limits = limits
        self.folder = tempfile.TemporaryDirectory(prefix='config_matrix_')
        self.stock: dict | None = None
        self.failed: dict | None = None
        self._start('stock', check_stock)

    def _start(self, name: str, check: Callable, *args) -> None:
        folder = Path(self.folder.name)
        self._out = folder / f'{name}.json'
        self._deadline = time.monotonic() + 10 * self.limits.seconds
        self.process = multiprocessing.get_context('fork').Process(
            target=_in_child, args=(check, self.run, self.limits, self._out, (folder, *args)))
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.folder.cleanup()

    def poll(self) -> dict | None:
        """The result, once there is one."""
        late = time.monotonic() > self._deadline
        if self.process.is_alive() and not late:
            return None
        if late:
            self.process.kill()
        self.process.join()
        try:
            found = json.loads(self._out.read_text())
        except (OSError, ValueError):
            late = late or self.process.exitcode == -signal.SIGXCPU
            found = dict(error=f'not within {self.limits.seconds:g} s' if late
                         else self._last_words())
        if self.stock is None and 'error' not in found:
            self.stock = found
            self._start('prompted', check_prompted, found)
            return None
        if self.failed is None and self.stock and (found.get('error') or found.get('faults')):
            self.failed = found
            self._start('step', check_stock_step, self.stock)
            return None
        self.folder.cleanup()
        return self._result(found)

    def _last_words(self) -> str:
        code = self.process.exitcode
        cause = signal.Signals(-code).name if code < 0 else f'status {code}'
        words = self._out.with_suffix('.log').read_text(errors='replace').strip()
        if _out_of_memory(words):
            return f'not within {self.limits.memory:g} GB'
        return _one_line(f'the process ended with {cause}: {words[-200:]}')

    def _result(self, found: dict) -> dict:
        parts = [part for part in (self.stock, self.failed, found) if part]
        seconds = round(sum(part.get('seconds', 0) for part in parts), 1)
        if self.stock and 'error' not in found:
            verdict = 'fail' if self.failed else 'pass'
            found = dict(self.failed or found, size=self.stock['size'])
        else:
            verdict = 'host'
        error, faults = found.pop('error', ''), found.pop('faults', [])
        return dict(found, key=self.run.key, configs=self.run.configs, verdict=verdict,
                    reason=error or '; '.join(faults), file=file_key(self.run.cfg),
                    seconds=seconds)


def check_all(runs: Sequence[Run], jobs: int = 1, limits: Limits = Limits()) -> Iterator[dict]:
    """Checks runs, in forked processes, and yields results as they come.

    Args:
        runs (Sequence[Run]): The runs.
        jobs (int): Processes at a time. Defaults to 1.
        limits (Limits): What each may take. Defaults to ``Limits()``.

    Yields:
        dict: ``key`` and ``configs`` of the run; ``verdict``: 'pass', 'fail', or 'host' where the
        stock model does not load, build, compute losses or take a step; ``reason``; ``file``, see
        :func:`file_key`; ``seconds`` of processor time for all models; ``traceback`` of an error;
        what :func:`check_prompted` returns.
    """
    for library in LIBRARIES:  # once, for all children
        importlib.import_module(f'{library}.models')
    waiting, active = list(runs), []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                if run.cfg is None:
                    yield dict(key=run.key, configs=run.configs, verdict='host', file=NO_FILE,
                               reason=f'the config does not load: {run.error}', seconds=0)
                else:
                    active.append(_Job(run, limits))
            if active:
                wait([job.process.sentinel for job in active], timeout=1)
            for job in list(active):
                result = job.poll()
                if result is not None:
                    active.remove(job)
                    yield result
    finally:
        for job in active:
            job.kill()


# --- results ---------------------------------------------------------------------------------


def settings(limits: Limits) -> dict:
    """What results depend on: limits and versions. Results under others are not put together."""
    versions = {name: importlib.import_module(name).__version__ for name in LIBRARIES}
    return dict(memory=limits.memory, seconds=limits.seconds, mmprotune=__version__,
                torch=torch.__version__, **versions)


class Log:
    """Results in a file of JSON lines, the first of which holds the settings.

    Args:
        path (Path, optional): The file; it is gone on with where it exists. None: no file.
        settings (dict): See :func:`settings`.

    Attributes:
        results (dict[str, dict]): By key.

    Raises:
        ValueError: The file is not such a log, or was begun with other settings.
    """

    def __init__(self, path: Path | None, settings: dict) -> None:
        self.path = path
        self.results: dict[str, dict] = {}
        if path is None:
            return
        text = path.read_text() if path.exists() else ''
        # A line that was being written when the command was cut off has no end.
        lines = text.splitlines() if text.endswith('\n') else text.splitlines()[:-1]
        if text and not lines:
            raise ValueError(f'{path} is no log of this tool')
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if number:
                    self.results[entry['key']] = entry
                elif entry['settings'] != settings:
                    raise ValueError(f'{path} was begun with {entry["settings"]}, not with '
                                     f'{settings}; name another file')
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number + 1}, is none of this tool') from None
        path.parent.mkdir(parents=True, exist_ok=True)
        if not lines:
            path.write_text(json.dumps(dict(settings=settings)) + '\n')
        elif not text.endswith('\n'):
            path.write_text('\n'.join(lines) + '\n')

    def add(self, result: dict) -> None:
        self.results[result['key']] = result
        if self.path is not None:
            with self.path.open('a') as file:
                file.write(json.dumps(result, default=str) + '\n')


def summary(results: Sequence[dict]) -> str:
    """One line: how many configs pass of those whose stock model runs here."""
    counts: Counter = Counter()
    for result in results:
        named = 'drawn' if result['file'] == NO_FILE else 'named'
        counts[result['verdict']] += len(result['configs'])
        counts[result['verdict'], named] += len(result['configs'])
    run = counts['pass'] + counts['fail']
    share = f' ({counts["pass"] / run:.1%})' if run else ''
    parts = ', '.join(
        f'{counts["pass", part]} of {counts["pass", part] + counts["fail", part]} of those that '
        f'name {what} pre-trained file' for part, what in (('named', 'a'), ('drawn', 'no')))
    return (f'{counts["pass"]} of {run} configs whose stock model runs here pass{share}: {parts}; '
            f'{counts["host"]} more do not run here')


def _cell(text: object) -> str:
    return str(text).replace('|', '/')


def markdown(results: Sequence[dict], settings: dict, command: str) -> str:
    """The page ``docs/configs.md``.

    Args:
        results (Sequence[dict]): Of :func:`check_all`.
        settings (dict): See :func:`settings`.
        command (str): What made them.

    Returns:
        str: Markdown.
    """
    versions = ', '.join(f'{name} {settings[name].partition("+")[0]}'
                         for name in ('mmprotune', 'torch', *LIBRARIES))
    limits = (f'{settings["memory"]:g} GB of address space and {settings["seconds"]:g} s of '
              'processor time')
    lines = [
        '# Stock configs', '',
        f'{summary(results)}. Written by `{command}` with {versions}, on a CPU.', '',
        'Every config that the libraries ship and that defines a model, as `tools/train.py '
        f'--protune` runs it, with {limits} for each process. `host`: the stock model itself does '
        'not load, build or compute its losses within these limits, or the prompted model fails '
        'and the stock one cannot take a training step either. Checked of the others: the '
        "prompted model builds, and takes a step on noise images with the config's optimizer; "
        "neither the model's own `init_weights()` nor the step moves a frozen tensor (SHA-256); "
        "every prompt parameter trains at the head's rate and gets a gradient, in a step on larger "
        'images where small ones leave some without. Images are small, batches of '
        f'two, and heads sample {SAMPLED["num"]} regions or {SAMPLED["num_points"]} points at '
        'most.', '',
        'The pre-trained files that configs name were not downloaded; random weights, with '
        'statistics in the norms that fit them, took their place. The column `file` is the key '
        'that names one; `none`: the config trains from scratch, and was given a file in '
        '`frozen_from`. Configs with the same model and optimizer share one line; `configs` '
        'counts them.', '',
        '| library | configs | runs | pass | fail | host |', '|---|---|---|---|---|---|'
    ]
    ordered = sorted(results, key=lambda r: r['configs'][0])
    for library in LIBRARIES:
        own = [r for r in ordered if r['configs'][0].startswith(f'{library}::')]
        counts = Counter()
        for r in own:
            counts[r['verdict']] += len(r['configs'])
        lines.append(f'| {library} | {sum(counts.values())} | {len(own)} | {counts["pass"]} | '
                     f'{counts["fail"]} | {counts["host"]} |')
    failed = [r for r in ordered if r['verdict'] == 'fail']
    if failed:
        lines += ['', '## Failures', '', '| config | configs | file | reason |',
                  '|---|---|---|---|']
        lines += [f'| {r["configs"][0]} | {len(r["configs"])} | {r["file"]} | '
                  f'{_cell(r["reason"])} |' for r in failed]
    lines += ['', '## All', '', '| config | configs | file | size | prompts | seconds | verdict |',
              '|---|---|---|---|---|---|---|']
    for r in ordered:
        verdict = f'host: {_cell(r["reason"])}' if r['verdict'] == 'host' else r['verdict']
        lines.append(f'| {r["configs"][0]} | {len(r["configs"])} | {r["file"]} | '
                     f'{r.get("size", "")} | {r.get("prompts", "")} | {r["seconds"]:g} | '
                     f'{verdict} |')
    return '\n'.join([*lines, ''])


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', metavar='GLOB', default='*',
                        help="names of configs to check, e.g. 'mmseg::*' (default: all)")
    parser.add_argument('--sample', type=int, metavar='N', help='check N configs drawn from them')
    parser.add_argument('--seed', type=int, default=0, help='of the drawing')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes at a time')
    parser.add_argument('--memory', type=float, default=Limits.memory, metavar='GB',
                        help='address space of one process (default: %(default)s)')
    parser.add_argument('--seconds', type=float, default=Limits.seconds,
                        help='processor time of one process, of which ten times as much may pass '
                        'by the clock (default: %(default)s)')
    parser.add_argument('--log', type=Path, metavar='FILE',
                        help='keep results there, as JSON lines, and go on with what it holds')
    parser.add_argument('--out', type=Path, help='write the table here (docs/configs.md)')
    args = parser.parse_args(argv)
    for option in ('jobs', 'memory', 'seconds', 'sample'):
        value = getattr(args, option)
        if value is not None and value <= 0:
            parser.error(f'--{option} must be more than 0, got {value:g}')
    args.names = [n for n in config_names() if fnmatch.fnmatchcase(n, args.only)]
    if not args.names:
        parser.error(f'--only: {args.only!r} matches none of the configs')
    args.limits = Limits(args.memory, args.seconds)
    try:
        args.log = Log(args.log, settings(args.limits))
    except (OSError, ValueError) as error:
        parser.error(f'--log: {error}')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status: 1 when a config fails."""
    warnings.simplefilter('ignore')
    args = parse_args(argv)
    print(f'reading {len(args.names)} configs', flush=True)
    # What they import and log while they are read is not ours.
    with open(os.devnull, 'w') as null, contextlib.redirect_stderr(null):
        runs = (runs_of(args.names) if args.sample is None
                else sample(args.names, args.sample, args.seed))
    left = [run for run in runs if run.key not in args.log.results]
    print(f'{sum(len(r.configs) for r in runs)} configs define a model, {len(runs)} of them a '
          f'different one; {len(runs) - len(left)} are done', flush=True)
    began = time.monotonic()
    for done, result in enumerate(check_all(left, args.jobs, args.limits), start=1):
        args.log.add(result)
        to_go = (time.monotonic() - began) / done * (len(left) - done)
        print(f'[{done}/{len(left)}, {_duration(to_go)} to go] {result["configs"][0]}: '
              f'{result["verdict"]} ({result["seconds"]:g} s) {result["reason"]}', flush=True)
    # The configs of today: a log may hold fewer of a run's.
    results = [dict(args.log.results[run.key], configs=run.configs) for run in runs]
    print(summary(results))
    if args.out:
        chosen = '' if args.only == '*' else f" --only '{args.only}'"
        if args.sample is not None:
            chosen += f' --sample {args.sample} --seed {args.seed}'
        command = f'python tools/analysis_tools/config_matrix.py{chosen} --out {args.out}'
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(markdown(results, settings(args.limits), command), encoding='utf-8')
    return 0 if all(r['verdict'] != 'fail' for r in results) else 1


if __name__ == '__main__':
    sys.exit(main())
