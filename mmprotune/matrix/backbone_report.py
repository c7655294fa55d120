"""The results of backbones as the page ``docs/backbones.md``."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from mmprotune import __version__

from .backbones import NOT_A_BACKBONE


def markdown(results: Sequence[dict], command: str) -> str:
    """The page ``docs/backbones.md``.

    Args:
        results (Sequence[dict]): Of :func:`~mmprotune.matrix.backbone_checks.check`.
        command (str): What made them.

    Returns:
        str: Markdown.
    """
    import mmdet
    import mmpretrain
    import mmseg
    run = [r for r in results if r['verdict'] != 'host']
    passed = [r for r in run if r['verdict'] == 'pass']
    lines = [
        '# Backbones', '',
        f'{len(passed)} of the {len(run)} backbone classes that build and run here pass every '
        f'check ({len(results)} are registered). Written by `{command}` with mmprotune '
        f'{__version__}, torch {torch.__version__.partition("+")[0]}, '
        f'mmdet {mmdet.__version__}, mmseg {mmseg.__version__}, '
        f'mmpretrain {mmpretrain.__version__}, on a CPU.', '',
        "The checks, each on the smallest architecture with random weights and `freeze='all'`: "
        'stages found; equal to the frozen backbone at the start, bitwise; gradients for exactly '
        'the prompts; one AdamW step moves prompts and nothing else, bitwise; a slim state dict '
        'restores the features; two image sizes (one where the backbone itself takes only one); '
        'lean layers give the features (bitwise with `rounds=False`, else and in inference within '
        '1e-4) and the gradients (1e-5) of ordinary ones. With `insert=` each of the other places: '
        'equal to the frozen backbone at the start, gradients for all prompts and nothing else.',
        '',
        'Prompts are the default block (bottleneck of 4) at every stage; their share is of the '
        "backbone's parameters. `kept` are the bytes that autograd keeps with lean layers, "
        'prompts included, as a share of those with ordinary ones; on images this small a little '
        'more than on large ones. The columns of the other places count their prompts; – where the '
        'backbone has no such place, which is an error that names the others. `host` means that '
        'the backbone itself does not build or run here.', '',
        '| backbone | arguments | stages | channels | prompt parameters | share | kept | blocks | '
        'branches | narrow | outputs | verdict |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|'
    ]
    for r in results:
        stages = r.get('stages', [])
        paths = ', '.join(s['path'] + ('' if s['index'] is None else f"[{s['index']}]")
                          for s in stages[:6]) + (f' … ({len(stages)})' if len(stages) > 6 else '')
        channels = ', '.join(str(s['channels']) for s in stages[:6])
        prompts = r.get('prompt_parameters')
        share = f"{prompts / r['parameters']:.1%}" if prompts else ''
        kept = f"{r['lean_bytes'] / r['naive_bytes']:.0%}" if r.get('naive_bytes') else ''
        kwargs = ', '.join(f'{k}={v}' for k, v in r.get('arguments', {}).items())
        verdict = r['verdict'] + (f": {r['reason']}" if r['reason'] else '')
        places = ' | '.join('–' if count is None else str(count) for count in (
            r.get('places', {}).get(insert, '') for insert in (
                'blocks', 'branches', 'narrow', 'outputs')))
        lines.append(f"| {r['name']} | {kwargs} | {paths} | {channels} | "
                     f"{'' if prompts is None else format(prompts, ',')} | {share} | {kept} | "
                     f"{places} | {verdict.replace('|', '/')} |")
    lines += ['', 'Registered beside the backbones, and none: '
              + '; '.join(f'{k} ({v})' for k, v in NOT_A_BACKBONE.items()) + '.', '']
    return '\n'.join(lines)
