"""Counts a model's parameters: what trains, what is frozen, and where."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmprotune.config_nodes import without_pretrained
from mmprotune.engine import cli
from mmprotune.engine.processes import prepare_processes
from mmprotune.lean.int8 import weights_in
from mmprotune.models import PromptedBackbone

COLUMNS = ('trainable', 'frozen', 'buffers')
GROUPS = ('backbone', 'prompts', 'neck', 'head', 'other')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument(
        '--protune', action='store_true', help='count the prompted form of a stock config')
    parser.add_argument(
        '--weights',
        action='store_true',
        help='load the pre-trained file first, and freeze exactly what it fills')
    parser.add_argument('--json', action='store_true', help='end with one line of JSON')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the counts.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    model = build(cli.read_config(args), weights=args.weights)
    report = dict(config=args.config, weights_loaded=args.weights, **count(model))

    print(table(report))
    prompted = any(isinstance(module, PromptedBackbone) for module in model.modules())
    if prompted and not args.weights:
        print('Counted without the pre-trained file, as if it filled the whole backbone: what it '
              'does not fill (output norms, say) trains, but counts as frozen here. --weights '
              'loads it.')
    if args.json:
        print(json.dumps(report))


def build(cfg: Config, weights: bool = False) -> nn.Module:
    """Builds a config's model as the Runner does.

    Args:
        cfg (Config): The config.
        weights (bool): Whether pre-trained files are loaded. Defaults to False.

    Returns:
        nn.Module: The model.
    """
    if not weights:
        cfg = without_pretrained(cfg)
    cfg.launcher = 'none'
    prepare_processes(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return MODELS.build(cfg.model)


def count(model: nn.Module) -> dict:
    """Counts the elements of all parameters and buffers; a shared tensor counts once.

    Args:
        model (nn.Module): The model.

    Returns:
        dict: ``groups``: trainable, frozen and buffers for each of ``GROUPS``; ``total``: the same
        for the model; ``trainable_share``: the trainable part of all parameters;
        ``prompts_to_backbone``: prompt parameters divided by the backbone's, None without prompts.
    """
    prompted = [
        name for name, module in model.named_modules() if isinstance(module, PromptedBackbone)
    ]
    groups = {group: dict.fromkeys(COLUMNS, 0) for group in GROUPS}
    for name, param in model.named_parameters():
        column = 'trainable' if param.requires_grad else 'frozen'
        groups[_group(name, prompted)][column] += param.numel()
    low = weights_in(model)  # which are no parameters any more
    for name, buffer in model.named_buffers():
        groups[_group(name, prompted)]['frozen' if name in low else 'buffers'] += buffer.numel()

    total = {column: sum(group[column] for group in groups.values()) for column in COLUMNS}
    sizes = {name: group['trainable'] + group['frozen'] for name, group in groups.items()}
    ratio = sizes['prompts'] / sizes['backbone'] if sizes['prompts'] else None
    return dict(
        groups=groups,
        total=total,
        trainable_share=total['trainable'] / max(1, sum(sizes.values())),
        prompts_to_backbone=ratio)


def _group(name: str, prompted: Sequence[str]) -> str:
    """The group of a tensor, by its dotted name; whatever is no other part belongs to the head."""
    for prefix in prompted:
        if name.startswith(f'{prefix}.prompts.'):
            return 'prompts'
        if name.startswith(f'{prefix}.'):
            return 'backbone'
    parts = name.split('.')
    for group in ('data_preprocessor', 'backbone', 'neck'):
        if group in parts:
            return 'other' if group == 'data_preprocessor' else group
    return 'head'


def table(report: dict) -> str:
    """The counts as text, a line a group."""
    rows = [(name, *(f'{group[column]:,}' for column in COLUMNS))
            for name, group in (*report['groups'].items(), ('total', report['total']))
            if any(group.values()) or name == 'total']
    rows.insert(0, ('', *COLUMNS))
    lines = [f'{row[0]:<10}' + ''.join(f'{cell:>14}' for cell in row[1:]) for row in rows]
    lines.append(f'trainable: {report["trainable_share"]:.1%} of all parameters')
    if report['prompts_to_backbone'] is not None:
        lines.append(f"prompts: {report['prompts_to_backbone']:.1%} of the backbone's parameters")
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
