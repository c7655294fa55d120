"""Builds a backbone with its pre-trained weights, and tells which parameters those filled."""
from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mmengine.config import ConfigDict
from mmengine.logging import MMLogger, print_log
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import Tensor, nn

from mmprotune.config_nodes import FILE_KEYS, dicts_in, file_inside, file_of
from mmprotune.errors import OptionError, PretrainedFileError
from mmprotune.freezing import FillRecorder, adopt, freeze
from mmprotune.registry import MODELS

# A pre-trained file that fills less of the backbone than this is the wrong file.
MINIMUM_FILLED = 0.9


@dataclass
class Built:
    """A backbone with its weights.

    Attributes:
        module (nn.Module): The backbone.
        filled (set[str], optional): Parameters and buffers that its files filled; None where it
            names no file. All of those of a module that came as it is.
        fixed (set[str]): Parameters that the backbone itself keeps from training, sine-cosine
            position tables for instance.
        source (str, optional): Where the weights come from, for messages.
        missing (str, optional): Why they could not be had; the weights are random then.
    """
    module: nn.Module
    filled: set[str] | None
    fixed: set[str]
    source: str | None
    missing: str | None = None


_thread = threading.local()


@contextlib.contextmanager
def filled_by(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, backbones that are built on this thread hold these frozen tensors in place of
    what their files would fill, in the same memory. No file is looked at.

    Args:
        tensors (Mapping[str, Tensor]): By dotted name in the backbone, on the CPU. A backbone that
            has no place for one raises ``DoesNotFit``.
    """
    _thread.tensors = tensors
    try:
        yield
    finally:
        del _thread.tensors


def build_backbone(cfg: ConfigDict,
                   pretrained: str | None = None,
                   init_cfg: dict | None = None,
                   frozen_from: str | None = None) -> Built:
    """Builds a backbone and loads its weights.

    A file that cannot be had is no error yet: a checkpoint that holds the backbone may follow.

    Args:
        cfg (ConfigDict): Config of a registered backbone; changed in place.
        pretrained (str, optional): File for a backbone that names none itself. Defaults to None.
        init_cfg (dict, optional): A ``Pretrained`` config, likewise. Defaults to None.
        frozen_from (str, optional): Checkpoint of a whole model whose part for this backbone is
            loaded last. Defaults to None.

    Raises:
        PretrainedFileError: The files fill less than 90% of the backbone.
        ValueError: ``init_cfg`` is of another type.
    """
    if init_cfg is not None and file_of(init_cfg) is None:
        raise OptionError(f"init_cfg must be of type 'Pretrained' or None, got {init_cfg!r}")
    # Wrappers of backbones have it further inside.
    has_file = file_inside(cfg) is not None
    if not has_file and pretrained is not None:
        init_cfg = dict(type='Pretrained', checkpoint=pretrained)
    if not has_file and init_cfg is not None:
        cfg.pop('pretrained', None)
        cfg['init_cfg'] = ConfigDict(init_cfg) if isinstance(init_cfg, dict) else init_cfg
        has_file = True
    source = frozen_from or (file_inside(cfg) if has_file else None)
    tensors = getattr(_thread, 'tensors', None)
    if tensors is not None:
        module = _build_without_files(cfg)
        adopt(module, tensors)
        return Built(module, set(tensors), _fixed(module), source)
    try:
        with FillRecorder() as recorder, _quiet():
            module = _build(cfg)
            if frozen_from is not None:
                _fill_from(module, frozen_from)
    except OSError as error:  # no such file, or no way to its address
        if source is None:
            raise
        module = _build_without_files(cfg)
        return Built(module, None, _fixed(module), source, f'{type(error).__name__}: {error}')
    if source is None:
        return Built(module, None, _fixed(module), None)
    filled = recorder.filled(module)
    # Whatever has no file beside a part that has one trains.
    part = '' if frozen_from is not None else _part_with_file(module)
    start = f'{part}.' if part else ''
    _check_filled(module.get_submodule(part),
                  {name[len(start):] for name in filled if name.startswith(start)},
                  recorder.file_shapes)
    return Built(module, filled, _fixed(module), source)


def given_backbone(module: nn.Module,
                   pretrained: str | None = None,
                   init_cfg: dict | None = None,
                   frozen_from: str | None = None) -> Built:
    """A backbone that is there already, with the weights that it has.

    Args:
        module (nn.Module): The backbone.
        pretrained, init_cfg, frozen_from: See :func:`build_backbone`; nothing would load them.

    Raises:
        ValueError: One of them is given.
    """
    for key, value in (('pretrained', pretrained), ('init_cfg', init_cfg),
                       ('frozen_from', frozen_from)):
        if value is not None:
            raise OptionError(f'{key} must be None where backbone is a module, whose weights stay '
                              f'as they are, got {value!r}; load it into the module before')
    _leave_freezing_to_us(module)
    filled = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    filled.update(name for name, _ in module.named_buffers(remove_duplicate=False))
    return Built(module, filled, _fixed(module), None)


def freeze_built(built: Built, everything: bool, trainable: Iterable[str]) -> frozenset[str]:
    """Freezes a backbone, and logs what of it trains although its file should have filled it.

    Args:
        built (Built): The backbone.
        everything (bool): Whether what no file filled is frozen as well.
        trainable (Iterable[str]): See :func:`mmprotune.freezing.freeze`.

    Returns:
        frozenset[str]: Names of the frozen parameters and buffers.

    Raises:
        PretrainedFileError: ``everything`` is False, and the backbone names no file.
        ValueError: ``trainable`` is wrong.
    """
    name = type(built.module).__name__
    if not everything and built.filled is None and built.missing is None:
        raise PretrainedFileError(
            f"freeze='pretrained' needs a pre-trained file, but backbone {name!r} names none "
            "(backbone.init_cfg=dict(type='Pretrained', checkpoint=…), on the wrapped backbone: "
            "inferencers delete the wrapper's own; or frozen_from='…' on the wrapper, which loads "
            "a checkpoint of the backbone or of a model around it, also where a backbone forbids "
            "init_cfg); freeze='all' freezes the backbone as it is, for a full checkpoint to fill "
            'it')
    keep = []
    if not everything and built.missing is None:
        keep = [n for n, _ in built.module.named_parameters() if n not in built.filled]
    frozen = freeze(built.module, keep=keep, trainable=trainable, fixed=built.fixed,
                    key='model.backbone.trainable')
    trained = [n for n in keep if n not in built.fixed]
    if trained:
        print_log(f'the pre-trained file did not fill {len(trained)} parameters of {name}; they '
                  f'train: {", ".join(trained)}', logger='current')
    if built.missing is not None:
        print_log(f'{name} has random weights: {built.source} cannot be had ({built.missing}); a '
                  'full checkpoint has to fill it', logger='current', level=logging.WARNING)
    return frozenset(frozen)


def _build(cfg: ConfigDict) -> nn.Module:
    # Who wraps the backbone freezes it; the host's own freezing in train() must not undo that.
    if 'frozen_stages' in cfg:
        cfg['frozen_stages'] = -1
        try:
            module = MODELS.build(cfg)
        except ValueError:  # EfficientNets count from 0, which freezes nothing
            cfg['frozen_stages'] = 0
            module = MODELS.build(cfg)
    else:
        module = MODELS.build(cfg)
    _leave_freezing_to_us(module)
    if hasattr(module, 'init_weights'):
        try:
            module.init_weights()
        except NotImplementedError as error:
            if 'interp2d' not in str(error):
                raise
            with _interp2d():
                module.init_weights()
    return module


@contextlib.contextmanager
def _interp2d():
    """While open, SciPy has ``interp2d`` again, which BEiTs stretch their tables of relative
    positions with, and which SciPy 1.14 took away."""
    from scipy import interpolate
    missing = interpolate.interp2d

    def interp2d(x, y, z, kind):
        degree = dict(linear=1, cubic=3)[kind]
        spline = interpolate.RectBivariateSpline(x, y, z.T, kx=degree, ky=degree)
        return lambda new_x, new_y: spline(new_x, new_y).T

    interpolate.interp2d = interp2d
    try:
        yield
    finally:
        interpolate.interp2d = missing


def _build_without_files(cfg: ConfigDict) -> nn.Module:
    for node in dicts_in(cfg):
        for key in FILE_KEYS:
            node.pop(key, None)
        if file_of(node.get('init_cfg')) is not None:
            del node['init_cfg']
    with _quiet():
        return _build(cfg)


def _leave_freezing_to_us(module: nn.Module) -> None:
    if getattr(module, 'frozen_stages', -1) != -1:
        module.frozen_stages = -1


def _fixed(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False)
            if not p.requires_grad}


def _part_with_file(module: nn.Module) -> str:
    """Path of the outermost module that names a file; '' where none says so."""
    return next((path for path, part in module.named_modules()
                 if file_of(getattr(part, 'init_cfg', None)) is not None), '')


def _fill_from(module: nn.Module, path: str) -> None:
    """Loads the part of a whole model's checkpoint that belongs to a backbone."""
    weights = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='current')
    for key in ('state_dict', 'model'):
        weights = weights.get(key, weights)
    names = list(module.state_dict())
    prefixes = {key[:-len(name)] for name in names[:20] for key in weights
                if key == name or key.endswith(f'.{name}')}
    if not prefixes:
        raise PretrainedFileError(
            f'frozen_from: {path} holds nothing of a {type(module).__name__}: its keys begin with '
            f'{list(weights)[:3]}, those of the backbone with {names[:3]}')
    # Of two that fit alike, as a student's and a teacher's, always the same one.
    prefix = min(prefixes, key=lambda p: (-sum(p + name in weights for name in names), len(p), p))
    load_state_dict(module, {key[len(prefix):]: value for key, value in weights.items()
                             if key.startswith(prefix)}, logger='current')


def _check_filled(module: nn.Module, filled: set[str], file: dict[str, tuple]) -> None:
    names = [name for name, _ in module.named_parameters()]
    count = sum(name in filled for name in names)
    if count >= MINIMUM_FILLED * len(names):
        return
    wanted = {key: tuple(t.shape) for key, t in module.state_dict().items()}
    hint = ''
    for prefix in {key.split('.')[0] + '.' for key in file}:
        if sum(prefix + key in file for key in wanted) > len(wanted) / 2:
            hint = f'; backbone.init_cfg.prefix={prefix!r} would fit'
    shapes = [f'{key} (file {file[key]}, backbone {shape})' for key, shape in wanted.items()
              if file.get(key, shape) != shape]
    if shapes:
        hint += f'; shapes that differ: {", ".join(shapes[:3])}'
    raise PretrainedFileError(
        f'the pre-trained file fills {count} of {len(names)} parameters of '
        f'{type(module).__name__}, expected at least {MINIMUM_FILLED:.0%}{hint}. '
        f"backbone.init_cfg: {getattr(module, 'init_cfg', None)}. Keys of the file begin "
        f'with {list(file)[:3]}, those of the backbone with {list(wanted)[:3]}')


@contextlib.contextmanager
def _quiet():
    """Keeps MMEngine's list of every parameter's initialisation off the console."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
