"""The table and the picture of a comparison of methods."""
from __future__ import annotations

import importlib
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from mmprotune.version import __version__

from .plan import Cell, mean_score, score_of

MIB = 2**20
LIBRARIES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


def rows_of(methods: Sequence[str], results: dict[Cell, dict], metric: str,
            rates: dict[str, float | None] | None = None) -> list[dict]:
    """What is known of each method.

    Args:
        methods (Sequence[str]): Names, in order.
        results (dict[Cell, dict]): Results by cell.
        metric (str): The metric.
        rates (dict[str, float], optional): The rate to tell of, by method. Of others, and where
            there is no final run with it, the one that did best on the held-out images. Defaults
            to None.

    Returns:
        list[dict]: ``method``; ``scores`` of the final runs by seed, their ``mean`` and ``sd``
        (None of one run); ``failed``, how many failed; ``lr``, the rate that the sweep chose;
        ``sweep``, mean score on the held-out images by rate (None where a run failed); ``edge``;
        ``error``; and the costs.
    """
    return [_row(method, results, metric, (rates or {}).get(method)) for method in methods]


def _row(method: str, results: dict[Cell, dict], metric: str, wanted: float | None) -> dict:
    own = {cell: result for cell, result in results.items() if cell.method == method}
    sweep = {}
    for lr in sorted({cell.lr for cell in own if cell.phase == 'sweep'}):
        score = mean_score([result for cell, result in own.items()
                            if cell.phase == 'sweep' and cell.lr == lr], metric)
        sweep[lr] = None if score == float('-inf') else score
    final = [cell for cell in own if cell.phase == 'final']
    # A grid that grew later may have chosen another rate than before.
    rates = sorted({cell.lr for cell in final})
    lr = wanted if wanted in rates else max(
        rates, key=lambda rate: (_number(sweep.get(rate)), -rate), default=None)
    runs = {cell.seed: score_of(own[cell], metric) for cell in final if cell.lr == lr}
    scores = {seed: score for seed, score in sorted(runs.items()) if score is not None}
    cost = own.get(Cell('cost', method), dict(metrics={}, error=''))
    errors = [cost['error'], *(own[cell]['error'] for cell in final if cell.lr == lr),
              *(result['error'] for cell, result in own.items() if cell.phase == 'sweep')]
    return dict(
        method=method, lr=lr, scores=scores,
        mean=statistics.fmean(scores.values()) if scores else None,
        sd=statistics.stdev(scores.values()) if len(scores) > 1 else None,
        failed=len(runs) - len(scores), sweep=sweep, edge=_edge(sweep, lr),
        error=next(filter(None, errors), ''), **cost['metrics'])


def _number(score: float | None) -> float:
    return float('-inf') if score is None else score


def _edge(sweep: dict[float, float | None], lr: float | None) -> str:
    if len(sweep) < 2 or lr is None:
        return ''
    return {min(sweep): 'lowest', max(sweep): 'highest'}.get(lr, '')


def table(rows: Sequence[dict], metric: str, about: dict) -> str:
    """The page ``methods.md``.

    Args:
        rows (Sequence[dict]): Of :func:`rows_of`.
        metric (str): The metric.
        about (dict): What ``run.json`` holds, :func:`machine`, and images ``held_out`` and
            ``trained`` on in the sweep.

    Returns:
        str: Markdown.
    """
    lines = [
        f'# Methods on {about["config"]}', '',
        f'`{metric}` on the validation set, mean and standard deviation over seeds. '
        + (f'Rates were chosen on {about["held_out"]} of the '
           f'{about["held_out"] + about["trained"]} training images, held out meanwhile; the runs '
           'in this table trained on all of them.' if about.get('held_out') else
           'One rate was given, so none was chosen.'), '',
        f'| method | {metric} | seeds | rate | trained in the backbone | trained | kept for the '
        'backward pass, MiB | weights saved, MB |', '|---|---|---|---|---|---|---|---|']
    for row in rows:
        lines.append('| ' + ' | '.join((
            row['method'], _score(row), str(len(row['scores'])),
            '' if row['lr'] is None else f'{row["lr"]:g}', _count(row, 'trained_backbone'),
            _count(row, 'trained'), _count(row, 'kept', MIB), _count(row, 'checkpoint', 1e6)))
            + ' |')
    remarks = []
    for row in rows:
        if row['edge']:
            remarks.append(f'{row["method"]}: its best rate {row["lr"]:g} is the {row["edge"]} '
                           'that was tried; a better one may lie beyond.')
        if row['failed']:
            remarks.append(f'{row["method"]}: {row["failed"]} final runs failed and are left out.')
        if row['error']:
            remarks.append(f'{row["method"]}: {row["error"].replace("|", "/")}')
    if remarks:
        lines += ['', *(f'- {remark}' for remark in remarks)]
    versions = ', '.join(f'{name} {version}' for name, version in about['versions'].items())
    lines += ['', f'Kept bytes are those of one step on the first training batch. {versions}; '
              f'{about["machine"]}.']
    return '\n'.join([*lines, ''])


def _score(row: dict) -> str:
    if row['mean'] is None:
        return ''
    return f'{row["mean"]:.4g}' + ('' if row['sd'] is None else f' ± {row["sd"]:.2g}')


def _count(row: dict, key: str, unit: float | None = None) -> str:
    if key not in row:
        return ''
    return f'{row[key]:,.0f}' if unit is None else f'{row[key] / unit:,.1f}'


def plot(rows: Sequence[dict], metric: str, file: Path) -> None:
    """Draws the metric against trained parameters and kept bytes.

    Args:
        rows (Sequence[dict]): Of :func:`rows_of`.
        metric (str): The metric.
        file (Path): PNG to write.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    known = [row for row in rows if row['mean'] is not None and 'kept' in row]
    for place, row in enumerate(sorted(known, key=lambda row: row['mean'])):
        # Head only trains nothing there, which a logarithmic axis does not have.
        for axes, x in ((left, row['trained_backbone']), (right, row['kept'] / MIB)):
            axes.errorbar(x, row['mean'], yerr=row['sd'], fmt='o', capsize=3)
            axes.annotate(row['method'], (x, row['mean']), textcoords='offset points',
                          # Of methods that are level, one name above the other.
                          xytext=(6, 4 if place % 2 else -11), fontsize=8)
    left.set_xscale('symlog', linthresh=1e3, linscale=0.5)
    left.set_xticks([0, *(10**i for i in range(3, 10))])
    most = max((row['trained_backbone'] for row in rows if 'kept' in row), default=1)
    left.set_xlim(-300, 6 * max(most, 1e3))
    left.set_xlabel('parameters that train in the backbone')
    right.set_xlabel('MiB kept for the backward pass of one step')
    left.set_ylabel(metric)
    for axes in (left, right):
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def machine() -> dict:
    """Versions and machine, for ``methods.json``."""
    versions = dict(mmprotune=__version__, torch=torch.__version__)
    for name in LIBRARIES:
        try:
            versions[name] = importlib.import_module(name).__version__
        except ImportError:
            continue
    device = (torch.cuda.get_device_name() if torch.cuda.is_available()
              else f'{platform.machine()} CPU')
    return dict(versions=versions, python=platform.python_version(), machine=device)


def write(methods: Sequence[str], results: dict[Cell, dict], metric: str, about: dict,
          folder: Path) -> str:
    """Writes ``methods.md``, ``methods.json`` and ``methods.png``; returns the first's text."""
    about = dict(machine(), **about)  # what the runs were on, where that is known
    split = folder / 'holdout.json'
    if split.is_file():
        divided = json.loads(split.read_text())
        about.update(held_out=len(divided['held']), trained=len(divided['train']))
    rows = rows_of(methods, results, metric, about.get('rates'))
    text = table(rows, metric, about)
    (folder / 'methods.md').write_text(text, encoding='utf-8')
    cells = [dict(phase=cell.phase, method=cell.method, lr=cell.lr, seed=cell.seed, **result)
             for cell, result in results.items()]
    (folder / 'methods.json').write_text(
        json.dumps(dict(about=about, metric=metric, methods=rows, cells=cells), indent=1) + '\n',
        encoding='utf-8')
    plot(rows, metric, folder / 'methods.png')
    return text
