"""Compares ways to fine-tune a config's backbone: full, head only, prompts of several kinds, peers.

Each method gets its own learning rate first, from a sweep that is scored on a part of the training
set that is held out (--holdout); then every seed trains on the whole training set and is scored on
the config's validation set, which never chooses a rate. Each run is the ordinary one of MMEngine,
in a process of its own. A command that was cut off goes on where it was; what failed is tried
again. OUT gets methods.md (a table), methods.json, methods.png, and cells.jsonl, one line a run.
"""
from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from mmprotune.comparison import plan as plans
from mmprotune.comparison import report as reports
from mmprotune.comparison import runs
from mmprotune.comparison.holdout import Split, make_split
from mmprotune.comparison.methods import Method, read_method
from mmprotune.comparison.plan import Plan, Results
from mmprotune.config_nodes import find_backbones, nodes_in, type_name
from mmprotune.engine import cli
from mmprotune.errors import LaunchError, listed

METHODS = Path(__file__).resolve().parents[1] / 'configs' / 'methods'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    known = ', '.join(sorted(path.stem for path in METHODS.glob('*.py')))
    parser.add_argument('--methods', nargs='+', metavar='METHOD',
                        help=f'{known}, or the path of a file like those in configs/methods')
    parser.add_argument('--lrs', nargs='+', type=float, metavar='LR',
                        help='learning rates to choose from; of one, no sweep is made')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help='of the final runs')
    parser.add_argument('--sweep-seeds', nargs='+', type=int, default=[0], help='of the sweep')
    parser.add_argument('--metric',
                        help='what decides about rates, the larger the better: mIoU, '
                        'coco/bbox_mAP, accuracy/top1, …')
    parser.add_argument('--out', type=Path, required=True, metavar='OUT')
    parser.add_argument('--holdout', type=float, default=0.2, metavar='SHARE',
                        help='part of the training images to score rates on (default: %(default)s)')
    parser.add_argument('--jobs', type=int,
                        help='runs at a time (default: one on a CPU, one on each GPU)')
    parser.add_argument('--threads', type=int, default=1,
                        help='of a run on a CPU (default: %(default)s)')
    parser.add_argument('--keep-weights', action='store_true',
                        help='final runs leave their weights and config in OUT/logs/final_…')
    parser.add_argument('--report', action='store_true',
                        help='run nothing; write table and picture of what OUT has')
    args = parser.parse_args(argv)
    missing = [f'--{option}' for option in ('methods', 'lrs', 'metric')
               if getattr(args, option) is None]
    if missing and not args.report:
        parser.error(f'{", ".join(missing)} must be given')
    for option in ('methods', 'lrs', 'seeds', 'sweep_seeds'):
        values = getattr(args, option) or ()
        if len(set(values)) < len(values):
            parser.error(f'--{option.replace("_", "-")}: a value is there twice: '
                         f'{" ".join(map(str, values))}')
    if min(args.seeds + args.sweep_seeds) < 0:
        parser.error('--seeds and --sweep-seeds must be at least 0, got '
                     f'{min(args.seeds + args.sweep_seeds)}')
    if any(not math.isfinite(lr) or lr <= 0 for lr in args.lrs or ()):
        parser.error(f'--lrs must be positive numbers, got {args.lrs}')
    if not 0 < args.holdout < 1:
        parser.error(f'--holdout must be between 0 and 1, got {args.holdout:g}')
    for option in ('jobs', 'threads'):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f'--{option} must be at least 1, got {value}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Compares.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    if args.report:
        report(args.out, args.methods, args.metric)
        return
    methods = [read_method(name, METHODS) for name in args.methods]
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise LaunchError(f'--methods: two have the same name: {", ".join(names)}')
    cfg = cli.read_config(args)
    check_config(cfg)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LaunchError(f'--out: another command is at work in {args.out}') from None
        results = Results(args.out / 'cells.jsonl')
        check_run(cfg, args, methods, results)
        split = None
        if len(args.lrs) > 1:
            split = make_split(cfg, args.holdout, args.out)
            if split.alone:
                print(f'too few images show {listed(split.alone)}: the held-out ones or the others '
                      'have none')
        use_no_workers(cfg, args)
        plan = Plan(methods, sorted(args.lrs), args.seeds, args.sweep_seeds, args.metric,
                    args.keep_weights)
        run(cfg, plan, split, results, args)
        note_outcome(args.out, plan, results)
    report(args.out, names, args.metric)


def report(folder: Path, names: Sequence[str] | None = None, metric: str | None = None) -> None:
    """Writes the table and the picture of what a folder has, and prints the table.

    Args:
        folder (Path): ``--out`` of a comparison.
        names (Sequence[str], optional): The methods to tell of. Defaults to None: all.
        metric (str, optional): Defaults to None: that of the last command.

    Raises:
        LaunchError: There is no comparison, or no run of a method.
    """
    if not (folder / 'run.json').is_file():
        raise LaunchError(f'--out: {folder} holds no comparison (no run.json)')
    about = json.loads((folder / 'run.json').read_text(encoding='utf-8'))
    results = Results(folder / 'cells.jsonl').known
    metric = metric or about.get('metric')
    if metric is None:
        raise LaunchError(f'--metric must be given: {folder / "run.json"} names none')
    check_metric(results, metric)
    there = {cell.method for cell in results}
    names = [Path(name).stem if name.endswith('.py') else name for name in names or ()]
    if set(names) - there:
        raise LaunchError(f'--methods: {folder} holds no run of '
                          f'{listed(sorted(set(names) - there))}, but of {listed(sorted(there))}')
    names = names or [name for name in about['methods'] if name in there]
    print(reports.write(names, results, metric, about, folder))
    print(f'written to {folder / "methods"}.md, .json, .png')


def check_config(cfg: Config) -> None:
    """Raises :class:`LaunchError` for a config that cannot be compared."""
    for key in ('model', 'train_dataloader', 'train_cfg', 'val_dataloader', 'val_evaluator'):
        if not cfg.get(key):
            raise LaunchError(f'config: no {key}, which a comparison needs: it trains, and scores '
                              'on the validation set')
    if not ((cfg.get('optim_wrapper') or {}).get('optimizer') or {}).get('lr'):
        raise LaunchError('config: no optim_wrapper.optimizer.lr, which --lrs would set')
    backbones = find_backbones(cfg.model)
    if len(backbones) != 1:
        raise LaunchError(f'config: the model must have one backbone, got {len(backbones)}')
    path, around = backbones[0]
    if type_name(around[-1]['backbone']) == 'PromptedBackbone':
        raise LaunchError(f'config: model.{path} is a PromptedBackbone already; name the config of '
                          'full fine-tuning, which the methods wrap')


def check_run(cfg: Config, args: argparse.Namespace, methods: Sequence[Method],
              results: Results) -> None:
    """Writes ``run.json``, or holds what is there against this command.

    Raises:
        LaunchError: The runs in the folder are of another comparison.
    """
    file = args.out / 'run.json'
    now = dict(config=args.config, metric=args.metric, holdout=args.holdout,
               flat=flat(cfg.to_dict()),
               methods={method.name: digest(method.content()) for method in methods})
    if file.is_file() and results.known:
        then = json.loads(file.read_text(encoding='utf-8'))
        keys = sorted(then['flat'].items() ^ now['flat'].items())
        changed = list(dict.fromkeys(key for key, _ in keys))
        if then['holdout'] != now['holdout']:
            changed.insert(0, '--holdout')
        used = {cell.method for cell, result in results.known.items() if not result['error']}
        changed += [f'the method {name}' for name, one in now['methods'].items()
                    if name in used and then['methods'].get(name, one) != one]
        if changed:
            told = listed(f'{key} ({then["flat"].get(key)}, now {now["flat"].get(key)})'
                          if key in then['flat'] or key in now['flat'] else key
                          for key in changed)
            raise LaunchError(f'--out: {args.out} holds another comparison, which differs in {told}'
                              '; name another folder')
        now['methods'] = {**then['methods'], **now['methods']}
        now['rates'] = then.get('rates', {})
    else:  # the division is of a command that no result is left of, and may be of other images
        (args.out / 'holdout.json').unlink(missing_ok=True)
    write_run(file, now)


def note_outcome(folder: Path, plan: Plan, results: Results) -> None:
    """Adds to ``run.json`` what tables tell: which rates were chosen, on which machine."""
    file = folder / 'run.json'
    about = json.loads(file.read_text(encoding='utf-8'))
    rates = {method.name: plans.sweep_of(plan, method, results.known).best
             for method in plan.methods}
    write_run(file, dict(about, rates={**about.get('rates', {}), **rates}, **reports.machine()))


def write_run(file: Path, about: dict) -> None:
    part = file.with_suffix('.part')
    part.write_text(json.dumps(about, indent=1), encoding='utf-8')
    part.replace(file)


def flat(node: object) -> dict[str, str]:
    """A config as one text a key, for comparing and for messages."""
    found = {}
    for path, one in nodes_in(node):
        for key, value in one.items():
            if not isinstance(value, dict):
                found[f'{path}.{key}' if path else str(key)] = text_of(value)
    return found


def text_of(value: object) -> str:
    return json.dumps(value, default=lambda one: getattr(one, '__qualname__', type(one).__name__))


def digest(content: dict) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def use_no_workers(cfg: Config, args: argparse.Namespace) -> None:
    """Lets runs on a CPU load their images themselves, where --cfg-options do not say otherwise."""
    if runs.devices():
        return
    for key in ('train_dataloader', 'val_dataloader'):
        if f'{key}.num_workers' not in (args.cfg_options or {}):
            cfg[key].update(num_workers=0, persistent_workers=False)
            cfg[key].pop('prefetch_factor', None)


def run(cfg: Config, plan: Plan, split: Split | None, results: Results,
        args: argparse.Namespace) -> None:
    """Runs what is not known yet.

    Raises:
        LaunchError: No run reports the metric.
    """
    results.forget_failures()
    jobs = args.jobs or len(runs.devices()) or 1
    done = sum(cell in results.known for cell in plans.due(plan, results.known))
    if done:
        print(f'{done} runs are in {results.file} already', flush=True)
    check_metric(results.known, plan.metric)
    for cell, result, left in runs.run_all(
            cfg, plan, split, results, args.out / 'logs', jobs, args.threads):
        seconds = plans.time_to_go(plan, results.known, left, jobs)
        told = result['error'] or (
            f'{plan.metric} {result["metrics"].get(plan.metric, math.nan):.4g}'
            if cell.phase != 'cost' else f'{result["metrics"]["trained_backbone"]:,.0f} parameters '
            'train in the backbone')
        print(f'[{left} to go, {duration(seconds)}] {cell.name}: {told} '
              f'({result["seconds"]:.0f} s)', flush=True)
        check_metric(results.known, plan.metric)


def check_metric(results: dict[plans.Cell, dict], metric: str) -> None:
    """Raises :class:`LaunchError` where runs were scored, but none by the metric: one alone may
    lack it (of a detector that finds nothing)."""
    scored = [result['metrics'] for cell, result in results.items()
              if cell.phase != 'cost' and not result['error']]
    if scored and not any(metric in one for one in scored):
        raise LaunchError(f'--metric: {metric!r} is not reported; val_evaluator reports '
                          f'{", ".join(scored[0])}')


def duration(seconds: float) -> str:
    """Hours and minutes as text."""
    if math.isnan(seconds):
        return 'time not known yet'
    minutes = math.ceil(seconds / 60)
    return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
