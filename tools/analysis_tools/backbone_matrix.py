"""Checks Pro-tuning on every backbone class that mmdet, mmseg and mmpretrain register.

Each backbone is checked in a process of its own, in its smallest architecture, with random weights
and ``freeze='all'``: it builds, its stages are found, prompts at their start change nothing
(bitwise), gradients reach exactly the prompts, one AdamW step moves prompts and nothing else
(bitwise), a slim state dict restores the features, two image sizes run, and lean layers give the
features (bitwise with rounds=False) and gradients of ordinary ones while keeping less. With prompts
at the other places (``insert``), where the backbone has them, it builds, starts as the frozen
backbone, and gradients reach every prompt.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from mmprotune.matrix.backbone_checks import check, first_line
from mmprotune.matrix.backbone_report import markdown
from mmprotune.matrix.backbones import backbones


def _check_in_a_process(name: str, seconds: float) -> dict:
    command = [sys.executable, '-W', 'ignore', __file__, '--one', name]
    env = dict(os.environ, OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=env, check=False)
    except subprocess.TimeoutExpired:
        return dict(name=name, verdict='fail', reason=f'took longer than {seconds:g} s')
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return dict(name=name, verdict='fail',
                    reason=f'the process ended with {done.returncode}: '
                    f'{first_line(done.stderr[-240:])}')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit status: 1 when a backbone fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', metavar='REGEX', default='', help='names to check')
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes at a time')
    parser.add_argument('--seconds', type=float, default=300, help='time limit of one backbone')
    parser.add_argument('--out', type=Path, help='write the table here (docs/backbones.md)')
    parser.add_argument('--json', action='store_true', help='print the results on one last line')
    parser.add_argument('--one', metavar='NAME', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    warnings.simplefilter('ignore')
    if args.one:
        print(json.dumps(check(args.one), default=str))
        return 0
    names = [n for n in backbones() if re.search(args.only, n)]
    if not names:
        parser.error(f'--only: {args.only!r} matches none of the registered backbones')
    with concurrent.futures.ThreadPoolExecutor(max(args.jobs, 1)) as pool:
        pending = {pool.submit(_check_in_a_process, n, args.seconds): n for n in names}
        results = {}
        for done in concurrent.futures.as_completed(pending):
            result = results[pending[done]] = done.result()
            print(f"[{len(results)}/{len(names)}] {result['name']}: {result['verdict']} "
                  f"({result.get('seconds', '?')} s) {result['reason']}", flush=True)
    ordered = [results[n] for n in names]
    run = [r for r in ordered if r['verdict'] != 'host']
    passed = sum(r['verdict'] == 'pass' for r in run)
    print(f'{passed} of {len(run)} backbones that run here pass')
    if args.out:
        command = 'python tools/analysis_tools/backbone_matrix.py' + (
            f" --only '{args.only}'" if args.only else '') + f' --out {args.out}'
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(markdown(ordered, command), encoding='utf-8')
    if args.json:
        print(json.dumps(ordered, default=str))
    return 0 if passed == len(run) else 1


if __name__ == '__main__':
    sys.exit(main())
