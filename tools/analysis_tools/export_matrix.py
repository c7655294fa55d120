"""Tries which configs export, with random weights, and writes the table of docs/export.md.

Each config is built without its pre-trained file, its prompts get random weights so that they act,
and it is written as .pt2 and .onnx and compared with PyTorch as tools/export.py does, in a process
of its own. With --log, results are kept in a file, and configs that are in it are not run again.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from mmprotune import __version__
from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.config_nodes import without_pretrained
from mmprotune.engine import cli
from mmprotune.engine.export import SUFFIXES, build, check_target, export
from mmprotune.errors import LaunchError, MMProtuneError

BEGIN, END = '<!-- export_matrix begins -->\n', '<!-- export_matrix ends -->\n'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='of prompted models')
    parser.add_argument('--seconds', type=float, default=600, help='time limit of one file')
    parser.add_argument('--log', type=Path, metavar='FILE.jsonl', help='results, one a line')
    parser.add_argument('--out', type=Path, metavar='PAGE.md',
                        help='page whose table is replaced, between its two marks')
    parser.add_argument('--one', metavar='SUFFIX', help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the tool.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    if args.one:
        print(json.dumps(try_out(args.configs[0], args.one)))
        return
    if args.out is not None:
        split_page(args.out)
    log = [] if args.log is None or not args.log.exists() else [
        json.loads(line) for line in args.log.read_text(encoding='utf-8').splitlines()]
    done = {(entry['config'], entry['suffix']): entry for entry in log}
    for config in args.configs:
        for suffix in SUFFIXES:
            key = (Path(config).stem, suffix)
            if key in done:
                continue
            done[key] = entry = dict(config=key[0], suffix=suffix,
                                     **run_apart(config, suffix, args.seconds))
            print(f'{key[0]} {suffix}: {entry["reason"] or "exports"} ({entry["seconds"]} s)',
                  flush=True)
            if args.log is not None:
                with args.log.open('a', encoding='utf-8') as file:
                    file.write(json.dumps(entry) + '\n')
    if args.out is not None:
        before, after = split_page(args.out)
        args.out.write_text(before + BEGIN + table(list(done.values())) + END + after,
                            encoding='utf-8')


def run_apart(config: str, suffix: str, seconds: float) -> dict:
    """:func:`try_out` in a process of its own."""
    start = time.monotonic()
    try:
        ended = subprocess.run(
            [sys.executable, '-W', 'ignore', __file__, config, '--one', suffix], text=True,
            capture_output=True, timeout=seconds, check=False, env={**os.environ})
        result = json.loads(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        result = dict(reason=f'not within {seconds:g} s')
    except (IndexError, ValueError):
        last = (ended.stderr.strip().splitlines() or ['no output'])[-1]
        result = dict(reason=f'ended with {ended.returncode}: {last[:200]}')
    return dict(result, seconds=round(time.monotonic() - start))


def try_out(config: str, suffix: str) -> dict:
    """Exports one config.

    Returns:
        dict: ``reason``, '' where it exports; then also ``kind``, ``free``, ``size``,
        ``difference``.
    """
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    cfg = without_pretrained(cli.load_config(config))
    with tempfile.TemporaryDirectory() as folder:
        try:
            out = check_target(Path(folder) / f'model{suffix}')
            model = build(cfg)
            with torch.no_grad():
                for _, part in prompted_parts(model):
                    for parameter in part.prompts.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.02)
            found = export(model, cfg, out)
        except MMProtuneError as error:
            return dict(reason=str(error))
    return dict(reason='', kind=found.kind, free=found.free, size=found.size,
                difference=found.difference)


def split_page(page: Path) -> tuple[str, str]:
    """What of a page stands before and behind its table.

    Raises:
        LaunchError: It has no marks.
    """
    text = page.read_text(encoding='utf-8') if page.is_file() else ''
    if BEGIN not in text or END not in text:
        raise LaunchError(f'--out: {page} has no lines {BEGIN.strip()} and {END.strip()}')
    return text.partition(BEGIN)[0], text.partition(END)[2]


def table(entries: Sequence[dict]) -> str:
    """The table, a row for each config."""
    lines = [f'Written with mmprotune {__version__}, torch {torch.__version__.partition("+")[0]}.',
             '', '| config | what | .pt2 | .onnx | difference of the .onnx |',
             '|---|---|---|---|--:|']
    of: dict[str, dict[str, dict]] = {}
    for entry in entries:
        of.setdefault(entry['config'], {})[entry['suffix']] = entry
    for config, found in sorted(of.items()):
        kind = next((e['kind'] for e in found.values() if 'kind' in e), '')
        onnx = found.get('.onnx', {})
        cells = [_cell(found.get(suffix)) for suffix in ('.pt2', '.onnx')]
        apart = f'{onnx["difference"]:.0e}' if 'difference' in onnx else ''
        lines.append(f'| {config} | {kind} | {" | ".join(cells)} | {apart} |')
    return '\n'.join(lines) + '\n'


def _cell(entry: dict | None) -> str:
    if entry is None:
        return 'not run'
    if entry['reason']:
        return re.sub(r'\s+', ' ', entry['reason']).replace('|', '/')
    if len(entry['free']) == 3:
        return 'yes'
    height, width = entry['size']
    batch = 'batch varies' if 'batch' in entry['free'] else 'two images'
    return f'{batch}, {height}x{width}'


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
