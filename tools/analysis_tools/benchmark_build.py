"""Seconds to build a backbone, stock and prompted.

Processor time of one thread, stock and prompted in turn, medians. Stock is what a run without this
package does: it builds the backbone and loads its pre-trained file (here one of drawn weights).
Prompted does that, freezes, finds the places for prompts, makes the layers lean and computes the
fingerprint.
"""
from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mmdet.models  # noqa: F401 registers
import mmpretrain.models  # noqa: F401 registers
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from mmprotune import __version__
from mmprotune.registry import MODELS

SWIN_L = dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=7)
BACKBONES = {
    'ResNet-50': dict(type='mmdet.ResNet', depth=50),
    'Swin-T': dict(type='mmdet.SwinTransformer'),
    'Swin-L': dict(type='mmdet.SwinTransformer', **SWIN_L),
    'ViT-B/16': dict(type='mmpretrain.VisionTransformer', arch='b', img_size=224, patch_size=16),
    'ConvNeXt-B': dict(type='mmpretrain.ConvNeXt', arch='base', out_indices=(0, 1, 2, 3),
                       gap_before_final_norm=False),
}


def seconds(cfg: dict, prompted: bool) -> float:
    """Processor seconds to build one backbone with its weights.

    Args:
        cfg (dict): Its config.
        prompted (bool): Whether it is wrapped.
    """
    cfg = ConfigDict(copy.deepcopy(cfg))
    if prompted:
        cfg = dict(type='mmprotune.PromptedBackbone', backbone=cfg)
    start = time.process_time()
    model = MODELS.build(cfg)
    model.init_weights()
    return time.process_time() - start


def measure(name: str, repeats: int, folder: Path) -> dict[str, float]:
    """Medians for one backbone.

    Args:
        name (str): One of ``BACKBONES``.
        repeats (int): How often each is built.
        folder (Path): For the pre-trained file.
    """
    cfg = BACKBONES[name]
    with DefaultScope.overwrite_default_scope(cfg['type'].partition('.')[0]):
        file = folder / 'drawn.pth'
        state = MODELS.build(copy.deepcopy(cfg)).state_dict()
        # As in a checkpoint of a whole model, which each of the libraries reads.
        torch.save(dict(state_dict={f'backbone.{k}': v for k, v in state.items()}), file)
        cfg = dict(cfg, init_cfg=dict(
            type='Pretrained', checkpoint=str(file), prefix='backbone.'))
        seconds(cfg, True)  # imports, caches
        taken = [[seconds(cfg, prompted) for prompted in (False, True)] for _ in range(repeats)]
    stock, prompted = map(statistics.median, zip(*taken))
    return dict(stock=stock, prompted=prompted, ratio=prompted / stock)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbones', nargs='+', choices=BACKBONES, default=list(BACKBONES),
                        metavar='NAME', help=f'of {", ".join(BACKBONES)} (default: all)')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures here, too')
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f'--repeats must be at least 1, got {args.repeats}')
    torch.set_num_threads(1)
    MMLogger.get_instance('build', log_level='ERROR')
    rows = {}
    print('| backbone | stock, s | prompted, s | ratio |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        for name in args.backbones:
            rows[name] = row = measure(name, args.repeats, Path(folder))
            print(f'| {name} | {row["stock"]:.2f} | {row["prompted"]:.2f} | {row["ratio"]:.2f} |',
                  flush=True)
    if args.json:
        args.json.write_text(json.dumps(dict(
            mmprotune=__version__, torch=torch.__version__, python=platform.python_version(),
            repeats=args.repeats, seconds=rows), indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
