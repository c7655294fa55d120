"""Writes a prompted model as ONNX or as PyTorch's exported program, prompts included.

OUT's suffix says which: .onnx or .pt2. Of classifiers and segmentors all is written, up to the
logits; of detectors backbone, neck and the raw outputs of the dense head, or with --boxes boxes and
scores. The file is compared with PyTorch before it gets its name.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmprotune.checkpoints.loading import fill
from mmprotune.checkpoints.reading import read, state_dict_of
from mmprotune.engine import cli
from mmprotune.engine.export import LIMIT, SUFFIXES, build, check_target, export
from mmprotune.engine.inference import config_of


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help="the checkpoint's config; '-' takes the one in it")
    parser.add_argument('checkpoint', help='local checkpoint of a prompted model, slim or full')
    parser.add_argument('out', help=f'where to write: a name that ends with {", ".join(SUFFIXES)}')
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='of the images to trace with, pixels; where the model does not let '
                        'sizes vary, the size of the file')
    parser.add_argument('--boxes', action='store_true',
                        help='of one-stage detectors: boxes in pixels and scores, before '
                        "thresholds and NMS, in place of the head's raw outputs")
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Exports.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    out = check_target(args.out, args.force)
    cli.check_checkpoint_path('checkpoint', args.checkpoint)
    loaded = read(args.checkpoint)
    state_dict_of(loaded, args.checkpoint)
    cfg = config_of(loaded, args.checkpoint, None if args.config == '-' else args.config, 'CONFIG')
    model = build(cfg)
    fill(model, loaded, args.checkpoint)
    meta = (loaded.get('meta') or {}).get('dataset_meta') if 'state_dict' in loaded else None
    if isinstance(meta, dict):
        model.dataset_meta = {str(key).lower(): value for key, value in meta.items()}
    done = export(model, cfg, out, args.size and [tuple(args.size)], args.boxes)
    told = done.description
    shape = [name if name in done.free else str(value) for name, value in zip(
        ('batch', 'channels', 'height', 'width'), (2, 3, *done.size))]
    print(f'{out}: {done.kind}, {out.stat().st_size / 2**20:.1f} MiB')
    print(f'  image ({", ".join(shape)}), {told["channels"]}, '
          f'minus {told.get("mean", "nothing")}, over {told.get("std", "1")}')
    print(f'  gives, of two images of {done.size[0]}x{done.size[1]}:')
    for name, sizes in done.outputs.items():
        print(f'    {name} ({", ".join(map(str, sizes))})')
    if told['note']:
        print(f'  {told["note"]}')
    print(f'  against PyTorch, {done.inputs} inputs: at most {done.difference:.1e} of the largest '
          f'value of an output (limit {LIMIT:g})')


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
