"""Looks into slim prompt checkpoints, makes them, turns them into full ones, and shares them."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import mmprotune
from mmprotune import checkpoint
from mmprotune.engine import cli
from mmprotune.errors import LaunchError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest='verb', required=True)
    verb = {}
    for name, text in (('info', 'print what a checkpoint holds'),
                       ('extract', 'make a slim checkpoint of a full one, or of a slim one with '
                        'an optimizer in it'),
                       ('merge', 'make a full checkpoint of a slim one; without prompts in the '
                        "stock model's own keys"),
                       ('verify', 'check a checkpoint against the backbone, head and classes of a '
                        'config')):
        verb[name] = verbs.add_parser(name, help=text, description=text)
        if name in ('info', 'verify'):
            verb[name].add_argument('--json', action='store_true', help='print JSON, on one line')
        if name != 'info':
            cli.add_config_arguments(verb[name])
        verb[name].add_argument('checkpoint', help='local checkpoint file')
        if name in ('extract', 'merge'):
            verb[name].add_argument('out', help='file to write')
            verb[name].add_argument('--force', action='store_true', help='replace OUT')
    verb['extract'].add_argument(
        '--prompts-only', action='store_true', help='leave necks and heads out as well')
    text = 'make a folder to share: adapter.safetensors, config.py and a model card'
    pack = verbs.add_parser('pack', help=text, description=text)
    pack.add_argument('run', help='work directory (its newest checkpoint) or slim checkpoint')
    pack.add_argument('out', help='folder to write')
    pack.add_argument('--config', help='config; the one in the checkpoint by default')
    pack.add_argument('--license', default='unknown', help="for the card: 'apache-2.0', …")
    pack.add_argument('--name', help='title of the card; the name of the folder by default')
    pack.add_argument('--force', action='store_true', help='replace what is there')
    text = 'upload a packed folder to the Hugging Face Hub'
    push = verbs.add_parser('push', help=text, description=text)
    push.add_argument('folder', help='what `pack` wrote')
    push.add_argument('repository', help='owner/name; made where there is none')
    push.add_argument('--private', action='store_true', help='make it a private one')
    return parser.parse_args(argv)


def _text(info: dict) -> str:
    lines = [
        f"{info['path']}: {info['kind']} checkpoint, {info['bytes']:,} bytes, "
        f"{info['tensors']} tensors, {info['values']:,} values"
    ]
    if info['epoch'] is not None:
        lines.append(f"  epoch {info['epoch']}, iteration {info['iter']}, "
                     f"{'resumable' if info['resumable'] else 'no optimizer state'}")
    for name, group in info['groups'].items():
        lines.append(f"  {name:<32} {group['tensors']:>5} tensors {group['values']:>14,} values "
                     f"{group['bytes']:>14,} bytes")
    for name, fingerprint in info['fingerprints'].items():
        lines.append(f'  {name or "model"}: fingerprint of the frozen backbone {fingerprint}')
        known = info['backbones'].get(name)
        if known:
            lines.append(f"    {known['type']}, {known['frozen_tensors']} frozen tensors "
                         f"({known['frozen_bytes']:,} bytes), last_stage={known['last_stage']}, "
                         f"written by mmprotune {info['version']}")
            lines += [f'    {key}: {known[key]}' for key in ('pretrained', 'frozen_from')
                      if known[key] is not None]
            lines += [
                f"    {s['name']}: {s['path']}, {s['channels']} channels, stride {s['stride']:g}"
                for s in known['stages']
            ]
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    try:
        if args.verb == 'push':
            print(mmprotune.push(args.folder, args.repository, private=args.private))
            return
        if args.verb == 'info':
            info = checkpoint.inspect(args.checkpoint)
        elif args.verb == 'pack':
            config = args.config and cli.load_config(args.config)
            info = mmprotune.pack(args.run, args.out, config, license=args.license,
                                  name=args.name, force=args.force)
        else:
            cfg = cli.read_config(args)
            if args.verb == 'verify':
                info = checkpoint.verify(args.checkpoint, cfg)
            elif args.verb == 'extract':
                info = checkpoint.extract(args.checkpoint, cfg, args.out, force=args.force,
                                          prompts_only=args.prompts_only)
            else:
                info = checkpoint.merge(args.checkpoint, cfg, args.out, force=args.force)
    except OSError as error:  # a missing or unwritable file, an output that exists
        raise LaunchError(str(error)) from error
    if getattr(args, 'json', False):
        print(json.dumps(info))
        return
    print(_text(info))
    if args.verb == 'verify':
        print('verify: ok')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
