"""The figures as a table and as a picture."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from .variants import HOSTS, PARTS, TITLES

MIB = 2**20


def table(result: dict) -> str:
    """The figures of one config as text, a line a variant.

    Args:
        result (dict): What :func:`~mmprotune.benchmark.measuring.measure` returned.
    """
    found = result['variants']
    rows = [('', 'kept MiB', 'alloc MiB', 'peak MiB', 'step s', 'min-max', 'fwd', 'bwd', 'opt',
             'infer s', 'kernels', 'state MiB', 'reduce MiB')]
    for name, f in found.items():
        timed = 'step' in f
        rows.append((
            TITLES[name], _mib(f['kept_total']), _mib(f['allocated']), _mib(f['peak']),
            f'{f["step"]:.3f}' if timed else '-',
            f'{f["fastest"]:.2f}-{f["slowest"]:.2f}' if timed else '-',
            *(f'{f[key]:.3f}' if key in f else '-'
              for key in ('forward', 'backward', 'optimizer', 'inference')),
            f'{f["kernels"]:,}' if f.get('kernels') else '-',
            _mib(f['optimizer_state']), _mib(f['gradients'])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [result['config']]
    for row in rows:
        lines.append('  '.join(c.ljust(w) if i == 0 else c.rjust(w)
                               for i, (c, w) in enumerate(zip(row, widths))))
    if 'lean' in found:
        lean = found['lean']
        for other in ('full', 'naive', 'frozen', *HOSTS, *(f'without {part}' for part in PARTS)):
            if other not in found:
                continue
            f = found[other]
            keys = ('kept_total', 'allocated', 'step', 'inference', 'kernels')
            ratios = [(key, lean[key] / f[key]) for key in keys if lean.get(key) and f.get(key)]
            lines.append(f'lean of {TITLES[other]}: ' + ', '.join(
                f'{dict(kept_total="kept", allocated="alloc").get(key, key)} {ratio:.3f}'
                for key, ratio in ratios))
    return '\n'.join(lines)


def _mib(count: int | None) -> str:
    return '-' if count is None else f'{count / MIB:.1f}'


def plot(results: list[dict], file: str) -> None:
    """Draws the kept bytes as stacked bars, a group for each config.

    Args:
        results (list[dict]): What :func:`~mmprotune.benchmark.measuring.measure` returned.
        file (str): PNG to write.
    """
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    parts = sorted({p for r in results for f in r['variants'].values() for p in f['kept']},
                   key=lambda p: (('neck', 'prompts', 'head').index(p) + 1 if p in (
                       'neck', 'prompts', 'head') else 0, p))
    colours = pyplot.get_cmap('viridis')(np.linspace(0, 0.95, len(parts)))
    figure, axes = pyplot.subplots(
        1, len(results), figsize=(1 + 3.7 * len(results), 4.2), squeeze=False)
    for axis, result in zip(axes[0], results):
        names = list(result['variants'])
        base = np.zeros(len(names))
        for part, colour in zip(parts, colours):
            height = np.array([result['variants'][n]['kept'].get(part, 0) / MIB for n in names])
            axis.bar(range(len(names)), height, bottom=base, color=colour, label=part)
            base += height
        for i, top in enumerate(base):
            axis.annotate(f'{top:.0f}', (i, top), ha='center', va='bottom', fontsize=8)
        axis.set_xticks(range(len(names)), [TITLES[n].replace(', ', ',\n').replace(' ', '\n', 1)
                                            for n in names], fontsize=8)
        axis.set_title(Path(result['config']).stem, fontsize=8)
        axis.margins(y=0.08)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0][0].set_ylabel('MiB kept for the backward pass')
    axes[0][-1].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
