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
import contextlib
import fnmatch
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from mmprotune.matrix.config_report import markdown, summary
from mmprotune.matrix.configs import config_names, runs_of, sample
from mmprotune.matrix.limits import Limits, check_all
from mmprotune.matrix.log import Log, settings
from mmprotune.models.insertion import INSERT


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
    parser.add_argument('--insert', choices=INSERT,
                        help='where prompts go (default: where --protune puts them)')
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
        args.log = Log(args.log, settings(args.limits, args.insert))
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
    results = check_all(left, args.jobs, args.limits, args.insert)
    for done, result in enumerate(results, start=1):
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
        if args.insert is not None:
            chosen += f' --insert {args.insert}'
        command = f'python tools/analysis_tools/config_matrix.py{chosen} --out {args.out}'
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(markdown(results, settings(args.limits, args.insert), command),
                            encoding='utf-8')
    return 0 if all(r['verdict'] != 'fail' for r in results) else 1


if __name__ == '__main__':
    sys.exit(main())
