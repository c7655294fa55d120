"""Evaluates a classifier under corruption, attack, shift or class imbalance."""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import os.path as osp
import sys
import time
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import ProgressBar

from mmprotune.engine import cli
from mmprotune.engine.runner import build_runner
from mmprotune.errors import LaunchError
from mmprotune.evaluation import mean_corruption_error
from mmprotune.evaluation.scenarios import (
    SCENARIOS,
    Options,
    describe_checkpoint,
    make_cells,
    run_cell,
)

TOP1 = 'accuracy/top1'
ECE = 'calibration/ece'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_arguments(parser, checkpoint=True)
    parser.add_argument('--scenario', required=True, choices=SCENARIOS)
    parser.add_argument(
        '--out', metavar='DIR', help='where JSON, table and plot go; a run that was cut off goes '
        'on from what is there (default: the work directory)')
    parser.add_argument('--json', action='store_true', help='end with one line of JSON')
    parser.add_argument('--limit', type=int, help='test images of a cell, evenly spaced')
    parser.add_argument('--seed', type=int, default=0, help='of corruptions and attacks')
    parser.add_argument(
        '--corruptions', nargs='+', default=['common'],
        help="names, 'common' (the fifteen) or 'all' (with the four of the validation set)")
    parser.add_argument('--severities', nargs='+', type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument('--reference', metavar='FILE.json',
                        help='corruption.json of the model whose errors normalise the mCE')
    parser.add_argument(
        '--attacks', nargs='+', default=['noise', 'fgsm', 'pgd-10'],
        help='fgsm, pgd-STEPS, autoattack, noise')
    parser.add_argument('--eps', nargs='+', type=float, default=[0.5, 1, 2, 4],
                        help='largest change of a pixel, 0 to 255')
    parser.add_argument('--shifts', nargs='+', metavar='NAME', default=['*'],
                        help="which of the config's shifted sets; * and ? as in a shell")
    parser.add_argument('--folder', metavar='DIR', help='shifted set: DIR/CLASS/*.jpg')
    parser.add_argument('--class-map', metavar='MAP', default='names',
                        help='of --folder: names, indices, wordnet, or a json or yaml file')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    if args.launcher != 'none':
        raise LaunchError('--launcher: the scenarios run in one process')
    reference = read_reference(args.reference)
    cfg = cli.set_up(args)
    out = args.out or cfg.work_dir
    os.makedirs(out, exist_ok=True)

    try:
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        options = read_options(args)
        cells = make_cells(cfg, args.scenario, options)
        # Wrong maps and missing packages come up now, not after an hour.
        runner = load_runner(cfg)
        report = evaluate(runner, cells, osp.join(out, f'{args.scenario}.json'),
                          describe_run(args, options))
        report['summary'] = summarise(args.scenario, report['cells'], reference)
    except (ImportError, OSError, ValueError) as error:
        if isinstance(error, LaunchError):
            raise
        raise LaunchError(f'--scenario {args.scenario}: {error}') from error
    write_json(osp.join(out, f'{args.scenario}.json'), report)
    text = table(report)
    with open(osp.join(out, f'{args.scenario}.txt'), 'w', encoding='utf-8') as file:
        file.write(text + '\n')
    plot(args.scenario, report, osp.join(out, f'{args.scenario}.png'))
    print(text)
    print(f'written to {osp.join(out, args.scenario)}.json, .txt, .png')
    if args.json:
        print(json.dumps(report))


def read_options(args: argparse.Namespace) -> Options:
    """The scenario's options from the command line's arguments."""
    corruptions = []
    if args.scenario == 'corruption':
        from mmprotune.datasets.corrupt import COMMON, EXTRA, SEVERITIES
        sets = dict(common=COMMON, all=COMMON + EXTRA)
        for name in args.corruptions:
            if name not in sets and name not in COMMON + EXTRA:
                raise ValueError(f'corruption must be common, all or one of '
                                 f'{", ".join(COMMON + EXTRA)}; got {name!r}')
            corruptions += sets.get(name, [name])
        wrong = [severity for severity in args.severities if severity not in SEVERITIES]
        if wrong:
            raise ValueError(f'severities must be 1 to 5, got {wrong}')
    shifts = {}
    if args.folder is not None:
        if not osp.isdir(args.folder):
            raise ValueError(f'--folder: no folder {args.folder!r}')
        name = osp.basename(osp.normpath(args.folder))
        shifts[name] = dict(
            dataset=dict(type='CustomDataset', data_root=args.folder), class_map=args.class_map)
    return Options(
        corruptions=list(dict.fromkeys(corruptions)), severities=args.severities,
        attacks=args.attacks, eps=args.eps, shifts=shifts, only=args.shifts,
        limit=args.limit, seed=args.seed)


def read_reference(path: str | None) -> dict | None:
    """Errors by corruption and severity, from a JSON file of this tool."""
    if path is None:
        return None
    try:
        with open(path, encoding='utf-8') as file:
            cells = json.load(file)['cells']
        return errors_of(cells)
    except (OSError, KeyError, ValueError) as error:
        raise LaunchError(
            f'--reference: {path!r} is no corruption.json: {error!r}') from error


def load_runner(cfg: Config):
    """A Runner whose model has the checkpoint's weights."""
    cfg.log_level = 'WARNING'
    runner = build_runner(cfg)
    # As Runner.test() begins; the loggers set themselves up there.
    runner.call_hook('before_run')
    runner.load_or_resume()
    return runner


def describe_run(args: argparse.Namespace, options: Options) -> dict:
    """What a result depends on; a file with another description is not gone on with.

    Cells are told apart by name, so a later run may add some.
    """
    return dict(
        config=args.config, cfg_options=json.loads(json.dumps(args.cfg_options, default=str)),
        checkpoint=describe_checkpoint(args.checkpoint), seed=options.seed, limit=options.limit,
        shifts=json.loads(json.dumps(dataclasses.asdict(options)['shifts'], default=str)))


def evaluate(runner, cells: Sequence, path: str, description: dict) -> dict:
    """Runs the cells that ``path`` does not have yet, and writes it after each."""
    done = {}
    if osp.isfile(path):
        with open(path, encoding='utf-8') as file:
            old = json.load(file)
        if old.get('run') == description:
            done = old['cells']
        else:
            cli.notify(f'{path} is of another run and will be overwritten')
    found = sum(cell.name in done for cell in cells)
    if found:
        print(f'{found} of {len(cells)} cells are in {path} already')
    bar = ProgressBar(len(cells), file=sys.stderr)
    for cell in cells:
        if cell.name not in done:
            start = time.time()
            done[cell.name] = dict(run_cell(runner, cell), seconds=round(time.time() - start, 2))
            write_json(path, dict(run=description, cells=done))
        bar.update()
    sys.stderr.write('\n')
    return dict(run=description, cells={cell.name: done[cell.name] for cell in cells})


def write_json(path: str, content: dict) -> None:
    """Writes a file whole or not at all."""
    with open(path + '.part', 'w', encoding='utf-8') as file:
        json.dump(content, file, indent=1)
    os.replace(path + '.part', path)


def errors_of(cells: dict) -> dict:
    """Error in percent by corruption and severity."""
    errors: dict[str, dict[int, float]] = {}
    for name, result in cells.items():
        corruption, _, severity = name.partition('/')
        if severity:
            errors.setdefault(corruption, {})[int(severity)] = 100 - result[TOP1]
    return errors


def summarise(scenario: str, cells: dict, reference: dict | None = None) -> dict:
    """The few numbers of a scenario, in percent."""
    summary = dict(clean=cells['clean'][TOP1], clean_ece=cells['clean'][ECE])
    if scenario == 'corruption':
        from mmprotune.datasets.corrupt import COMMON
        errors = {name: by for name, by in errors_of(cells).items() if name in COMMON}
        if errors:
            summary['corruptions'] = len(errors)
            summary['mean_corruption_error'] = mean_corruption_error(errors)[0]
            if reference is not None:
                summary['mCE'], summary['CE'] = mean_corruption_error(errors, reference)
    elif scenario == 'adversarial':
        summary.update({name: result[TOP1] for name, result in cells.items() if name != 'clean'})
    elif scenario == 'ood':
        for name, result in cells.items():
            if name.rpartition('/')[2] == 'clean':
                continue
            base = cells.get(f'{name}/clean', cells['clean'])[TOP1]
            summary[name] = dict(
                accuracy=result[TOP1], same_classes_clean=base, gap=base - result[TOP1],
                ece=result[ECE])
    else:
        summary.update({key.partition('/')[2]: value for key, value in cells['shots'].items()
                        if key.startswith('shot/')})
    return summary


def table(report: dict) -> str:
    """The cells and the summary as text."""
    width = max(len(name) for name in report['cells']) + 2
    lines = [f'{"":<{width}}{"accuracy":>10}{"ECE":>8}{"images":>8}{"seconds":>9}']
    for name, cell in report['cells'].items():
        lines.append(f'{name:<{width}}{cell[TOP1]:>10.2f}{cell[ECE]:>8.2f}{cell["images"]:>8}'
                     f'{cell["seconds"]:>9.1f}')
    for key, value in report['summary'].items():
        if isinstance(value, float):
            lines.append(f'{key}: {value:.2f}')
        elif isinstance(value, dict):
            lines.append(f'{key}: ' + ', '.join(f'{k} {v:.2f}' for k, v in value.items()))
    return '\n'.join(lines)


def plot(scenario: str, report: dict, path: str) -> None:
    """Accuracy against severity or epsilon; bars where there is neither."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.add_subplot()
    cells = report['cells']
    if scenario in ('corruption', 'adversarial'):
        curves: dict[str, dict[float, float]] = {}
        for name, cell in cells.items():
            curve, _, x = name.rpartition('/')
            if curve:
                curves.setdefault(curve, {0.: cells['clean'][TOP1]})[float(x)] = cell[TOP1]
        for i, (name, points) in enumerate(curves.items()):
            axes.plot(*zip(*sorted(points.items())), marker='o', markersize=3, label=name,
                      linestyle=('-', '--', ':')[i // 10 % 3])
        axes.set_xlabel('severity' if scenario == 'corruption' else 'epsilon (of 255)')
        axes.legend(fontsize=7, ncols=2)
    else:
        bars = {name: cell[TOP1] for name, cell in cells.items()}
        if scenario == 'longtail':
            bars = {k: v for k, v in report['summary'].items() if k != 'clean_ece'}
        axes.bar(list(bars), list(bars.values()))
        axes.tick_params(axis='x', labelrotation=20)
    axes.set_ylim(0, 100)
    axes.set_ylabel('accuracy (%)')
    figure.savefig(path, dpi=120)


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
