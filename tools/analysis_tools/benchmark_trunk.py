"""Measures what a FrozenTrunk saves: 1, 2, 4, 8 tasks on one frozen backbone against as many
separate models.

Detectors, segmentors and classifiers take turns. Their frozen backbone is that of --weights;
prompts and heads have random weights, which changes neither memory nor time but the number of
boxes, which is limited. Trunk and separate models are measured in a fresh process each, one after
the other.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import nn

import mmprotune
from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from mmprotune.engine import cli
from mmprotune.engine.inference import check_image

KINDS = ('detector', 'segmentor', 'classifier')
SCOPES = dict(detector='mmdet', segmentor='mmseg', classifier='mmpretrain')
# Backbone, channels and strides of its maps, mean and deviation.
BACKBONES = dict(
    resnet50=(dict(type='mmdet.ResNet', depth=50, norm_eval=True, style='pytorch',
                   out_indices=(0, 1, 2, 3)),
              [256, 512, 1024, 2048], [4, 8, 16, 32], [123.675, 116.28, 103.53],
              [58.395, 57.12, 57.375]),
    vit_tiny=(dict(type='mmpretrain.VisionTransformer', arch='deit-t', img_size=224, patch_size=16,
                   out_type='featmap', out_indices=(2, 5, 8, 11)),
              [192] * 4, [16] * 4, [127.5] * 3, [127.5] * 3))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', help='image files')
    parser.add_argument('--backbone', choices=BACKBONES, default='resnet50')
    parser.add_argument('--weights', required=True, help="the backbone's pre-trained file")
    parser.add_argument('--insert', default='outputs',
                        help="where prompts are: PromptedBackbone's insert; none: no prompts")
    parser.add_argument('--tasks', type=int, nargs='+', default=[1, 2, 4, 8])
    parser.add_argument('--scale', type=int, default=224,
                        help='images are resized to fit a square of this side')
    parser.add_argument('--repeats', type=int, default=3, help='timed passes over each image')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', metavar='FILE', help='add the figures to those there')
    parser.add_argument('--plot', metavar='PNG', help='draw all figures of --json there')
    parser.add_argument('--measure', choices=['trunk', 'separate'], help=argparse.SUPPRESS)
    parser.add_argument('--files', nargs='+', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plot and not args.json:
        parser.error('--plot draws the figures of --json, which is missing')
    for option in ('scale', 'repeats'):
        if getattr(args, option) < 1:
            parser.error(f'--{option} must be at least 1, got {getattr(args, option)}')
    if min(args.tasks) < 1:
        parser.error(f'--tasks must be at least 1, got {min(args.tasks)}')
    return args


# On a CPU its own time: other programs do not count. A GPU is waited for.
def clock() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


# --- tasks ------------------------------------------------------------------------------------


def task_cfg(kind: str, args: argparse.Namespace) -> Config:
    """Config of one task; all of them preprocess images alike."""
    inner, channels, strides, mean, std = BACKBONES[args.backbone]
    where = dict(prompt=None) if args.insert == 'none' else dict(insert=args.insert)
    backbone = dict(
        type='mmprotune.PromptedBackbone', **where,
        backbone=dict(inner, init_cfg=dict(type='Pretrained', checkpoint=args.weights)))
    resize = dict(type='Resize', scale=(args.scale, args.scale), keep_ratio=args.backbone != (
        'vit_tiny'))
    load = dict(type='LoadImageFromFile')
    if kind == 'detector':
        cfg = cli.load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco')
        model = cfg.model
        model.data_preprocessor.update(mean=mean, std=std, pad_size_divisor=1)
        model.neck.in_channels = channels
        model.rpn_head.anchor_generator.strides = [*strides, 2 * strides[-1]]
        model.roi_head.bbox_roi_extractor.featmap_strides = strides
        model.test_cfg.rpn.update(nms_pre=100, max_per_img=100)
        pack = dict(type='PackDetInputs', meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
        cfg.test_dataloader.dataset.pipeline = [load, resize, pack]
    elif kind == 'segmentor':
        steps = [load, resize, dict(type='PackSegInputs')]
        cfg = Config(dict(
            model=dict(
                type='EncoderDecoder',
                data_preprocessor=dict(type='SegDataPreProcessor', mean=mean, std=std,
                                       bgr_to_rgb=True, pad_val=0, seg_pad_val=255),
                decode_head=dict(type='FCNHead', in_channels=channels[-1], in_index=3, channels=128,
                                 num_convs=1, num_classes=19, norm_cfg=dict(type='BN')),
                train_cfg=dict(), test_cfg=dict(mode='whole')),
            test_pipeline=steps))
    else:
        cfg = Config(dict(
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(mean=mean, std=std, to_rgb=True),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=1000, in_channels=channels[-1])),
            test_dataloader=dict(dataset=dict(pipeline=[load, resize, dict(type='PackInputs')]))))
    cfg.default_scope = SCOPES[kind]
    cfg.model.backbone = backbone
    return cfg


def write_task(path: Path, kind: str, args: argparse.Namespace, seed: int) -> str:
    """A slim checkpoint, as training would leave it, with prompts that act."""
    cfg = task_cfg(kind, args)
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.backbone.prompts.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    meta = dict(cfg=cfg.pretty_text, mmprotune=checkpoint.describe_model(model))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)
    return str(path)


# --- one process ------------------------------------------------------------------------------


def resident(device: str) -> int:
    """Bytes that this process holds on the device."""
    gc.collect()
    if device.startswith('cuda'):
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory for later
        ctypes.CDLL('libc.so.6').malloc_trim(0)
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


class Peak:
    """Most bytes that this process held on the device at a time since this was made."""

    def __init__(self, device: str):
        self.cuda = device.startswith('cuda')
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # Linux begins to count anew
                Path('/proc/self/clear_refs').write_text('5')

    def __call__(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        status = Path('/proc/self/status').read_text()
        return int(status.split('VmHWM:')[1].split()[0]) * 1024


@contextlib.contextmanager
def timed_backbones(models: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Seconds in each call of the models' frozen backbones. Prompts on outputs, which are each
    task's own, come behind."""
    seconds, started = [], []
    handles = []
    for model in models:
        handles += [
            model.backbone.backbone.register_forward_pre_hook(
                lambda *_: started.append(clock())),
            model.backbone.backbone.register_forward_hook(
                lambda *_: seconds.append(clock() - started.pop()), prepend=True)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def measure(args: argparse.Namespace) -> list[dict]:
    """Adds one task after the other and measures at the counts asked for."""
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    # What libraries and the first run of each kind take is not the tasks'.
    warm = mmprotune.FrozenTrunk(args.device)
    for kind, path in zip(KINDS, args.files):
        warm.add(kind, path)
    warm(args.images[0])
    for kind in KINDS:
        if kind in warm:
            warm.remove(kind)
    before = resident(args.device)
    trunks, found, adding, above = [], [], [], []
    for i, path in enumerate(args.files):
        if args.measure == 'separate' or not trunks:
            trunks.append(mmprotune.FrozenTrunk(args.device))
        held, peak, start = resident(args.device), Peak(args.device), clock()
        trunks[-1].add(f'task{i}', path)
        adding.append(clock() - start)
        above.append(peak() - held)
        if i + 1 not in args.tasks:
            continue
        held = resident(args.device) - before
        models = [trunk.model(name) for trunk in trunks for name in trunk.tasks]
        for trunk in trunks:  # what has to be copied is found out on the first image
            trunk(args.images[0])
        images, backbones = [], []
        for _ in range(args.repeats):
            for image in args.images:
                with timed_backbones(models) as seconds:
                    start = clock()
                    for trunk in trunks:
                        trunk(image)
                    images.append(clock() - start)
                backbones.append(sum(seconds))
        entries = [entry for trunk in trunks for entry in trunk.report().trunks]
        found.append(dict(
            tasks=i + 1, resident=held, tensors=sum(
                entry.nbytes + sum(entry.own_bytes.values()) for entry in entries),
            image_s=statistics.median(images), backbone_s=statistics.median(backbones),
            first_add_s=adding[0],
            later_add_s=statistics.median(adding[1:]) if i else None,
            adding_peak=max(above[1:], default=above[0])))
    del models, entries
    held = resident(args.device)
    trunks[-1].remove(trunks[-1].tasks[-1])
    found[-1]['given_back'] = held - resident(args.device)
    return found


# --- all of them ------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both ways and prints a table."""
    args = parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args)))
        return
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    for image in args.images:
        check_image(image)
    cli.check_checkpoint_path('--weights', args.weights)
    argv = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        files = [write_task(Path(folder) / f'{i}.pth', KINDS[i % 3], args, i)
                 for i in range(max(args.tasks))]
        found = {}
        for way in ('trunk', 'separate'):
            done = subprocess.run(
                [sys.executable, __file__, *argv, '--measure', way, '--files', *files],
                stdout=subprocess.PIPE, text=True, check=True)
            found[way] = json.loads(done.stdout.splitlines()[-1])
    result = dict(backbone=args.backbone, insert=args.insert, scale=args.scale,
                  images=len(args.images), repeats=args.repeats, device=args.device,
                  threads=torch.get_num_threads(), torch=torch.__version__, **found)
    print(table(result))
    if args.json:
        path = Path(args.json)
        results = json.loads(path.read_text()) if path.exists() else []
        key = ('backbone', 'insert', 'device', 'scale')
        results = [r for r in results if any(r[k] != result[k] for k in key)] + [result]
        path.write_text(json.dumps(results, indent=1) + '\n')
        if args.plot:
            plot(results, args.plot)


def table(result: dict) -> str:
    lines = [f'{result["backbone"]}, prompts: {result["insert"]}',
             '| tasks | memory, MiB | separate | peak of adding one, MiB | separate | s an image '
             '| separate | s in backbones | separate | s to add one more | separate |',
             '|--:' * 11 + '|']
    for ours, theirs in zip(result['trunk'], result['separate']):
        cells = [str(ours['tasks'])]
        for key in ('resident', 'adding_peak'):
            cells += [f'{way[key] / 2**20:.0f}' for way in (ours, theirs)]
        for key in ('image_s', 'backbone_s', 'later_add_s'):
            cells += ['–' if way[key] is None else f'{way[key]:.3f}' for way in (ours, theirs)]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def plot(results: list[dict], path: str) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, len(results), figsize=(4.2 * len(results), 6), squeeze=False)
    for column, result in zip(axes.T, results):
        column[0].set_title(f'{result["backbone"]}, prompts: {result["insert"]}', fontsize=10)
        for axis, key, unit, factor in ((column[0], 'resident', 'resident memory, MiB', 2**20),
                                        (column[1], 'backbone_s', 's an image in backbones', 1)):
            for way, style in (('trunk', 'o-'), ('separate', 's--')):
                axis.plot([r['tasks'] for r in result[way]],
                          [r[key] / factor for r in result[way]], style,
                          label=dict(trunk='FrozenTrunk', separate='separate models')[way])
            axis.set_ylabel(unit)
            axis.set_xlabel('tasks')
            axis.set_xticks([r['tasks'] for r in result['trunk']])
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
