"""Runs a trained classifier through a robustness scenario, cell by cell.

A cell is one evaluation: one corruption at one severity, one attack at one epsilon, one shifted
set. Each is a run of MMEngine's test loop with the config's own test set, pipeline and metrics, in
which one thing is changed.
"""
from __future__ import annotations

import copy
import fnmatch
import os.path as osp
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, TestLoop

from mmprotune.config_nodes import type_name
from mmprotune.errors import OptionError, ScenarioError
from mmprotune.registry import DATASETS

from .attack import AttackedClassifier, check_attack
from .shot_accuracy import count_classes

SCENARIOS = ('corruption', 'adversarial', 'ood', 'longtail')


@dataclass(frozen=True)
class Cell:
    """One evaluation.

    Attributes:
        name (str): Unique in its scenario: 'fog/3', 'pgd-10/1', 'imagenet_a'.
        dataloader (dict): Config of the test dataloader.
        evaluator (list | dict): Config of the evaluator.
        attack (dict, optional): Arguments of ``perturb``.
        to_rgb (bool): Whether the model's preprocessor turns the channels of the pipeline's
            images round. For the model's own test set that is what the config says.
    """
    name: str
    dataloader: dict
    evaluator: list | dict
    attack: dict | None = None
    to_rgb: bool = False


@dataclass
class Options:
    """What the scenarios can be told.

    Attributes:
        corruptions (Sequence[str]): Names of corruptions.
        severities (Sequence[int]): 1 to 5.
        attacks (Sequence[str]): 'fgsm', 'pgd-10' (with steps), 'autoattack', 'noise'.
        eps (Sequence[float]): Largest changes of a pixel's value, 0 to 255.
        shifts (dict): Shifted sets by name: ``dataset``, ``class_map``, ``restrict`` and
            ``to_rgb``, which is found out where it is not given.
        only (Sequence[str]): Patterns of the names of shifted sets, as in a shell.
        limit (int, optional): Test images of a cell, evenly spaced over the set. None: all.
        seed (int): Of corruptions and attacks.
    """
    corruptions: Sequence[str] = ()
    severities: Sequence[int] = (1, 2, 3, 4, 5)
    attacks: Sequence[str] = ('fgsm', 'pgd-10')
    eps: Sequence[float] = (0.5, 1, 2, 4)
    shifts: dict = field(default_factory=dict)
    only: Sequence[str] = ('*', )
    limit: int | None = None
    seed: int = 0


def make_cells(cfg: Config, scenario: str, options: Options) -> list[Cell]:
    """The cells of a scenario; the first one, 'clean', is the unchanged test set.

    Args:
        cfg (Config): Config of an MMPretrain classifier.
        scenario (str): One of ``SCENARIOS``.
        options (Options): What to evaluate.

    Returns:
        list[Cell]: In the order in which they run.

    Raises:
        ScenarioError: The config lacks what the scenario needs.
        OptionError: An option has no such value.
    """
    if cfg.get('default_scope') != 'mmpretrain':
        raise ScenarioError('the scenarios are for classifiers: expected a config with '
                            f"default_scope='mmpretrain', got {cfg.get('default_scope')!r}")
    makers: dict[str, Callable[..., Iterator[Cell]]] = dict(
        corruption=_corruption, adversarial=_adversarial, ood=_ood, longtail=_longtail)
    if scenario not in makers:
        raise OptionError(f'scenario must be one of {SCENARIOS}, got {scenario!r}')
    if cfg.get('test_dataloader') is None:
        raise ScenarioError('test_dataloader: the config names no test set')
    loader = _to_dict(cfg.test_dataloader)
    if options.limit is not None:
        limit_images(loader, options.limit)
    clean = Cell('clean', loader, metrics(), to_rgb=_to_rgb(cfg))
    cells = [clean, *makers[scenario](cfg, clean, options)]
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        raise OptionError(f'cells are named twice: {names}')
    return cells


def metrics() -> list[dict]:
    """list[dict]: Metrics of every cell."""
    return [dict(type='Accuracy', topk=(1, )), dict(type='mmprotune.CalibrationError')]


def _corruption(cfg: Config, clean: Cell, options: Options) -> Iterator[Cell]:
    for corruption in options.corruptions:
        for severity in options.severities:
            loader = copy.deepcopy(clean.dataloader)
            pipeline = innermost(loader['dataset'])['pipeline']
            transform = dict(
                type='mmprotune.Corrupt', corruption=corruption, severity=severity,
                channel_order=channel_order(pipeline), seed=options.seed)
            # Behind everything that changes the size.
            pipeline.insert(len(pipeline) - 1, transform)
            yield Cell(f'{corruption}/{severity}', loader, metrics(), to_rgb=clean.to_rgb)


def _adversarial(cfg: Config, clean: Cell, options: Options) -> Iterator[Cell]:
    for name in options.attacks:
        kind, _, steps = name.partition('-')
        attack = dict(kind=kind, seed=options.seed)
        if steps:
            if kind != 'pgd' or not steps.isdigit():
                raise OptionError(f"attack {name!r}: only PGD has steps, as in 'pgd-10'")
            attack['steps'] = int(steps)
        for eps in options.eps:
            check_attack(kind, eps, attack.get('steps', 1))
            yield Cell(f'{name}/{eps:g}', clean.dataloader, metrics(), dict(attack, eps=eps),
                       clean.to_rgb)


def _ood(cfg: Config, clean: Cell, options: Options) -> Iterator[Cell]:
    shifts = options.shifts or _to_dict(cfg.get('shifts') or {})
    if not shifts:
        raise ScenarioError('the config names no shifted sets: expected shifts=dict(NAME=dict('
                            'dataset=…, class_map=…)), or --folder with --class-map')
    chosen = {name for pattern in options.only for name in fnmatch.filter(shifts, pattern)}
    if not chosen:
        raise ScenarioError(f'no shifted set is called {" or ".join(options.only)}; there are '
                            f'{", ".join(shifts)}')
    shifts = {name: shift for name, shift in shifts.items() if name in chosen}
    source = class_names(clean.dataloader['dataset'])
    own_steps = innermost(clean.dataloader['dataset'])['pipeline']
    for name, shift in shifts.items():
        unknown = set(shift) - {'dataset', 'class_map', 'to_rgb', 'restrict', 'classes'}
        if unknown or not {'dataset', 'class_map'} <= set(shift):
            raise ScenarioError(f'shifts.{name}: expected dataset and class_map (and to_rgb, '
                                f'restrict, classes), got {sorted(shift)}')
        dataset = dict(copy.deepcopy(shift['dataset']))
        if 'pipeline' not in dataset:
            steps = [step for step in own_steps if type_name(step) != 'LoadImageFromFile']
            # NumpyImages hands images over decoded; all others read files.
            dataset['pipeline'] = steps if type_name(dataset) == 'NumpyImages' else [
                dict(type='LoadImageFromFile'), *steps]
        loader = dict(copy.deepcopy(clean.dataloader), dataset=dataset)
        if options.limit is not None:
            limit_images(loader, options.limit)
        # The model gets the order that it gets from its own test set.
        turned = channel_order(innermost(dataset)['pipeline']) != channel_order(own_steps)
        to_rgb = shift.get('to_rgb', clean.to_rgb != turned)
        common = dict(type='mmprotune.ClassMapEvaluator', metrics=metrics(),
                      restrict=shift.get('restrict', True))
        names = shift.get('classes') or source
        yield Cell(name, loader, dict(common, class_map=shift['class_map'], source=names),
                   to_rgb=to_rgb)
        # What the gap is measured against: the model's own test set, cut down to the same classes.
        own = inverse_map(shift['class_map'], class_names(dataset), names, source,
                          common['restrict'])
        if list(own.values()) == [[i] for i in range(len(source))]:
            continue  # the same classes: the clean cell will do
        yield Cell(f'{name}/clean', clean.dataloader, dict(common, class_map=own, source=source),
                   to_rgb=clean.to_rgb)


def inverse_map(class_map, target: Sequence[str], names: Sequence[str], source: Sequence[str],
                restrict: bool) -> dict:
    """The class map under which the model's own test set is evaluated on the same concepts.

    Args:
        class_map (str | Mapping): Class map of the shifted set.
        target (Sequence[str]): Classes of the shifted set.
        names (Sequence[str]): The model's classes as the map calls them.
        source (Sequence[str]): The model's classes as its own test set calls them.
        restrict (bool): See :class:`~mmprotune.evaluation.ClassMap`.

    Returns:
        dict: Indices of a concept's classes for each of ``source``, None for the others.
    """
    from .class_map import ClassMap
    members = ClassMap(class_map, target, names, restrict).members
    concept = {i: indices for indices in members for i in indices}
    return {name: concept.get(i) for i, name in enumerate(source)}


def _longtail(cfg: Config, clean: Cell, options: Options) -> Iterator[Cell]:
    train = cfg.get('train_dataloader')
    if not train:
        raise ScenarioError('the config has no train_dataloader, whose images are to be counted')
    counts = count_classes(_to_dict(train)['dataset'])
    shots = dict(type='mmprotune.ShotAccuracy', class_counts=counts)
    yield Cell('shots', clean.dataloader, [*metrics(), shots], to_rgb=clean.to_rgb)


def run_cell(runner: Runner, cell: Cell) -> dict[str, float]:
    """Evaluates one cell.

    Args:
        runner (Runner): Its model has its weights.
        cell (Cell): The cell.

    Returns:
        dict[str, float]: Metrics by name, and ``images``, their number.
    """
    model = runner.model
    preprocessor = getattr(model, 'module', model).data_preprocessor
    before = preprocessor.to_rgb
    preprocessor.to_rgb = cell.to_rgb
    try:
        if cell.attack is not None:
            if hasattr(model, 'module'):
                raise ScenarioError('attacks run in one process')
            runner.model = AttackedClassifier(model, cell.attack)
        loop = TestLoop(runner, copy.deepcopy(cell.dataloader), copy.deepcopy(cell.evaluator))
        result = loop.run()
    finally:
        runner.model = model
        preprocessor.to_rgb = before
    return dict({k: float(v) for k, v in result.items()}, images=len(loop.dataloader.dataset))


def limit_images(loader: dict, limit: int) -> None:
    """Keeps ``limit`` images of a dataset, evenly spaced, so that sorted classes keep their shares.

    Args:
        loader (dict): Config of a dataloader; changed in place.
        limit (int): At least 1; a set that is smaller stays as it is.
    """
    if limit < 1:
        raise OptionError(f'limit must be at least 1, got {limit}')
    dataset = innermost(loader['dataset'])
    total = len(build_dataset(dataset))
    if total > limit:
        dataset['indices'] = np.linspace(0, total, limit, endpoint=False).astype(int).tolist()


def channel_order(pipeline: Sequence[dict]) -> str:
    """str: 'bgr' where a pipeline reads files, as OpenCV does; 'rgb' where the data set hands over
    decoded images, as mmpretrain's CIFAR-10 and ``NumpyImages`` do."""
    reads = any(type_name(step).startswith('LoadImage') for step in pipeline)
    return 'bgr' if reads else 'rgb'


def innermost(dataset: dict) -> dict:
    """dict: The config of a dataset, without the wrappers around it."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def build_dataset(dataset: dict):
    """Builds a dataset without its pipeline, which counting and naming do not need."""
    dataset = copy.deepcopy(dataset)
    innermost(dataset)['pipeline'] = []
    dataset = DATASETS.build(dataset)
    dataset.full_init()
    return dataset


def class_names(dataset: dict) -> tuple[str, ...]:
    """tuple[str, ...]: Class names of a dataset, by label."""
    names = build_dataset(dataset).metainfo.get('classes')
    if not names:
        raise ScenarioError(f'{dataset["type"]}: the dataset names no classes (metainfo.classes)')
    return tuple(names)


def _to_rgb(cfg: Config) -> bool:
    preprocessor = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    return bool(preprocessor.get('to_rgb', False))


def _to_dict(node):
    """Plain dicts and lists, copied."""
    if isinstance(node, ConfigDict):
        return node.to_dict()
    return copy.deepcopy(node)


def describe_checkpoint(path: str) -> list:
    """list: What tells one checkpoint file from another without reading it: name, size, time."""
    stat = osp.getsize(path), int(osp.getmtime(path))
    return [osp.basename(path), *stat]
