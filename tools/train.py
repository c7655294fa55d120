"""Trains the model of a config: prompted, head only, or as its library ships it."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmprotune.engine import cli, training
from mmprotune.engine.runner import build_runner


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_arguments(parser)
    parser.add_argument(
        '--protune',
        action='store_true',
        help='freeze the backbone of a stock config and train prompts and head; --cfg-options '
        'then act on the wrapped config (the stock backbone is model.backbone.backbone)')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the batch size (auto_scale_lr.base_batch_size)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint; without a value, from the newest in the work directory')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    cfg = cli.set_up(args)
    if args.amp:
        training.use_amp(cfg)
    if args.auto_scale_lr:
        training.use_auto_scale_lr(cfg)
    training.set_resume(cfg, args.resume)
    if cfg.get('load_from'):
        cli.check_checkpoint_path('load_from', cfg.load_from)
    training.check_pretrained_files(cfg)

    build_runner(cfg).train()


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
