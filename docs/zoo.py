"""Packs the runs that docs/zoo.md has commands for, and writes its table from their model cards.

A command there trains into ``--work-dir work_dirs/zoo/NAME``; what lies in that folder is packed
into ``packed/NAME`` beside it, as `tools/prompt_checkpoint.py pack` does it.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

import mmprotune
from mmprotune.engine import cli
from mmprotune.engine.adapter import ADAPTER, CARD
from mmprotune.errors import CheckpointError, LaunchError

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = '<!-- zoo begins -->\n', '<!-- zoo ends -->\n'
COMMAND = re.compile(r'--work-dir work_dirs/zoo/([\w.-]+)')
# Of the metrics of a card the first that it has.
METRICS = {'coco/segm_mAP': 'mask AP', 'coco/bbox_mAP': 'box AP', 'mIoU': 'mIoU',
           'accuracy/top1': 'top-1'}
HEAD = ['adapter', 'model', 'frozen backbone', 'fingerprint', 'data set', 'trained for', 'result',
        'adapter.safetensors']


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=Path, default=Path('work_dirs/zoo'),
                        help='folder of the work directories')
    parser.add_argument('--page', type=Path, default=ROOT / 'docs' / 'zoo.md')
    parser.add_argument('--license', default='unknown', help='of the adapters, for their cards')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    text = args.page.read_text(encoding='utf-8')
    if BEGIN not in text or END not in text:
        raise LaunchError(f'--page: {args.page} has no lines {BEGIN.strip()} and {END.strip()}')
    rows = []
    for name in COMMAND.findall(text):
        if not (args.runs / name).is_dir():
            raise LaunchError(f'--runs: no folder {args.runs / name}; its command on the page '
                              'makes it')
        out = args.runs / 'packed' / name
        mmprotune.pack(args.runs / name, out, license=args.license, name=name, force=True)
        rows.append(row_of(out))
        print(f'{out}: {rows[-1][-1]}', flush=True)
    lines = [f'| {" | ".join(cells)} |' for cells in (HEAD, ['---'] * len(HEAD), *rows)]
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    args.page.write_text(before + BEGIN + '\n'.join(lines) + '\n' + END + after, encoding='utf-8')


def row_of(packed: Path) -> list[str]:
    """What the model card of a packed adapter says, as cells below ``HEAD``."""
    card = (packed / CARD).read_text(encoding='utf-8')
    _, front, text = card.split('---\n', 2)
    facts = dict(re.findall(r'^\| ([^|]+?) \| (.+) \|$', text, re.MULTILINE))
    results = (yaml.safe_load(front).get('model-index') or [dict(results=[])])[0]['results']
    found = {metric['type']: metric['value'] for result in results for metric in result['metrics']}
    metric = next((key for key in METRICS if key in found), None)
    if metric is None:
        raise CheckpointError(f'{packed / CARD} has none of the metrics {", ".join(METRICS)}: '
                              'the run has no validation of its last checkpoint')
    value = found[metric] * (100 if metric.startswith('coco/') else 1)
    backbone = facts['frozen backbone']
    file = facts.get('its pre-trained file')
    return [packed.name, re.search(r'^A (\S+) tuned', text, re.MULTILINE)[1],
            f'{backbone}, {file}' if file else backbone,
            f'`{facts["its fingerprint"].strip("`")[:8]}`', facts['trained on'],
            facts.get('trained for', ''), f'{METRICS[metric]} {value:.1f}',
            f'{(packed / ADAPTER).stat().st_size / 1e6:.1f} MB']


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
