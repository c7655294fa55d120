"""What a comparison of methods consists of: which runs, and what came out of them."""
from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmprotune.errors import LaunchError

from .methods import Method

# How often the grid is extended on a side where the best rate is its last.
EXTENSIONS = 2


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        phase (str): 'cost' counts parameters and bytes, 'sweep' trains without the held-out images
            and is scored on them, 'final' trains on all and is scored on the validation set.
        method (str): Name of the method.
        lr (float, optional): Learning rate; None in the phase 'cost'.
        seed (int, optional): Likewise.
    """
    phase: str
    method: str
    lr: float | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        rest = '' if self.lr is None else f'_lr{self.lr}_seed{self.seed}'
        return f'{self.phase}_{self.method}{rest}'


# --- what is to be run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        methods (Sequence[Method]): The methods.
        lrs (Sequence[float]): The grid, ascending; of one rate no sweep is made.
        seeds (Sequence[int]): Of the final runs.
        sweep_seeds (Sequence[int]): Of the sweep.
        metric (str): Decides about rates; the larger the better.
        keep_weights (bool): Whether the final runs leave their weights.
    """
    methods: Sequence[Method]
    lrs: Sequence[float]
    seeds: Sequence[int]
    sweep_seeds: Sequence[int]
    metric: str
    keep_weights: bool = False


@dataclass
class Sweep:
    """Where the sweep of one method stands.

    Attributes:
        cells (list[Cell]): All that are to be run so far.
        best (float, optional): The best rate, once all have been run; None where all failed.
        done (bool): Whether all have been run.
        edge (str): 'lowest' or 'highest' where the best rate is the last of the extended grid.
    """
    cells: list[Cell]
    best: float | None = None
    done: bool = False
    edge: str = ''


def sweep_of(plan: Plan, method: Method, results: dict[Cell, dict]) -> Sweep:
    """Which rates of a method are to be tried, given what is known already.

    The grid is extended by its own factor where the best rate is its last, at most
    ``EXTENSIONS`` times a side. A rate with a failed run counts as worse than all others.
    """
    rates = [lr if method.lr_scale == 1 else _rounded(lr * method.lr_scale) for lr in plan.lrs]
    if len(rates) == 1:
        return Sweep([], rates[0], True)
    down, up = rates[0] / rates[1], rates[-1] / rates[-2]
    lowered = raised = 0
    while True:
        cells = {lr: [Cell('sweep', method.name, lr, seed) for seed in plan.sweep_seeds]
                 for lr in rates}
        flat = [cell for one in cells.values() for cell in one]
        if any(cell not in results for cell in flat):
            return Sweep(flat)
        scores = {lr: mean_score([results[cell] for cell in one], plan.metric)
                  for lr, one in cells.items()}
        # Of equals the one in the middle: nothing speaks for going on at an end.
        middle = (len(rates) - 1) / 2
        best = max(rates, key=lambda lr: (scores[lr], -abs(rates.index(lr) - middle)))
        if scores[best] == -math.inf:
            return Sweep(flat, None, True)
        if best == rates[-1] and raised < EXTENSIONS:
            rates.append(_rounded(rates[-1] * up))
            raised += 1
        elif best == rates[0] and lowered < EXTENSIONS:
            rates.insert(0, _rounded(rates[0] * down))
            lowered += 1
        else:
            edge = {rates[0]: 'lowest', rates[-1]: 'highest'}.get(best, '')
            return Sweep(flat, best, True, edge)


def _rounded(lr: float) -> float:
    return float(f'{lr:.3g}')


def mean_score(results: Sequence[dict], metric: str) -> float:
    """Mean of a metric over runs; minus infinity where one failed."""
    values = [score_of(result, metric) for result in results]
    return -math.inf if None in values else sum(values) / len(values)


def score_of(result: dict, metric: str) -> float | None:
    """The metric of one run; None where it failed, or where that is no finite number."""
    value = None if result['error'] else result['metrics'].get(metric)
    return value if value is not None and math.isfinite(value) else None


def due(plan: Plan, results: dict[Cell, dict]) -> list[Cell]:
    """All cells that can be run now or have been, given what is known already, in order.

    Args:
        plan (Plan): The plan.
        results (dict[Cell, dict]): What is known.

    Returns:
        list[Cell]: Costs of all methods, then method by method. More may come up once these are
        known; a method whose costs could not be counted has no others.
    """
    cells = [Cell('cost', method.name) for method in plan.methods]
    for method in plan.methods:
        cost = results.get(Cell('cost', method.name))
        if cost is None or cost['error']:
            continue
        sweep = sweep_of(plan, method, results)
        cells += sweep.cells
        if sweep.done and sweep.best is not None:
            cells += [Cell('final', method.name, sweep.best, seed) for seed in plan.seeds]
    return cells


def still_to_come(plan: Plan, results: dict[Cell, dict]) -> int:
    """How many final runs are not due yet, as their rate is not known."""
    count = 0
    for method in plan.methods:
        cost = results.get(Cell('cost', method.name))
        if cost is None:
            count += (0 if len(plan.lrs) == 1 else len(plan.lrs) * len(plan.sweep_seeds))
        if cost is None or not cost['error'] and not sweep_of(plan, method, results).done:
            count += len(plan.seeds)
    return count


def time_to_go(plan: Plan, results: dict[Cell, dict], left: int, jobs: int) -> float:
    """Seconds, by the mean of the runs that trained so far."""
    times = [result['seconds'] for cell, result in results.items()
             if cell.phase != 'cost' and not result['error']]
    return left * sum(times) / len(times) / jobs if times else math.nan


# --- what is known ------------------------------------------------------------------------------


class Results:
    """Results in a file of JSON lines, one a cell; later lines of a cell stand for earlier ones.

    Args:
        file (Path): The file; it is gone on with where it exists.

    Attributes:
        known (dict[Cell, dict]): By cell: ``metrics``, ``seconds``, ``error``.

    Raises:
        LaunchError: It is none of this kind.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[Cell, dict] = {}
        text = file.read_text(encoding='utf-8') if file.exists() else ''
        # A line that was being written when the command was cut off has no end.
        lines = text.splitlines() if text.endswith('\n') else text.splitlines()[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise LaunchError(f'{file}, line {number}, is no result of this tool: '
                                  f'{error!r}') from None
        if text and not text.endswith('\n'):
            whole = ''.join(line + '\n' for line in lines)
            part = file.with_suffix('.part')
            part.write_text(whole, encoding='utf-8')
            part.replace(file)

    def _take(self, entry: dict) -> None:
        cell = Cell(entry['phase'], entry['method'], entry['lr'], entry['seed'])
        self.known[cell] = {key: entry[key] for key in ('metrics', 'seconds', 'error')}

    def add(self, cell: Cell, result: dict) -> None:
        """Keeps a result, on disk too before anything else begins."""
        entry = dict(asdict(cell), **result)
        self._take(entry)
        with self.file.open('a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')
            file.flush()
            os.fsync(file.fileno())

    def forget_failures(self) -> None:
        """What failed is tried again; the file keeps it until it has been."""
        self.known = {cell: result for cell, result in self.known.items() if not result['error']}
