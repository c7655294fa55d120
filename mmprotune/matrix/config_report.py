"""The results of configs as a line and as the page ``docs/configs.md``."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from . import LIBRARIES
from .configs import SAMPLED
from .files import NO_FILE


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
        results (Sequence[dict]): Of :func:`~mmprotune.matrix.limits.check_all`.
        settings (dict): See :func:`~mmprotune.matrix.log.settings`.
        command (str): What made them.

    Returns:
        str: Markdown.
    """
    versions = ', '.join(f'{name} {settings[name].partition("+")[0]}'
                         for name in ('mmprotune', 'torch', *LIBRARIES))
    limits = (f'{settings["memory"]:g} GB of address space and {settings["seconds"]:g} s of '
              'processor time')
    places = f' with `insert={settings["insert"]!r}`' if settings['insert'] else ''
    lines = [
        '# Stock configs', '',
        f'{summary(results)}. Written by `{command}` with {versions}, on a CPU.', '',
        'Every config that the libraries ship and that defines a model, as `tools/train.py '
        f'--protune` runs it{places}, with {limits} for each process. `host`: the stock model '
        'itself does not load, build or compute its losses within these limits, or the prompted '
        'model fails and the stock one cannot take a training step either. Checked of the others: '
        "the prompted model builds, and takes a step on noise images with the config's optimizer; "
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
