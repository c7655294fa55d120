"""Shows Pro-tuning at work without downloading anything, and fails when it does not work.

1. Draws a small COCO-format set of overlapping shapes (quickstart_data.py).
2. Pre-trains a small ResNet on another drawn task (quickstart_pretrain.py).
3. Trains Mask R-CNN on the frozen backbone with tools/train.py, with prompts and with the head
   alone, at the same time and otherwise alike.
4. Evaluates both checkpoints with tools/test.py.
5. Prints one table, and draws predictions of both beside the ground truth.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
from quickstart_data import write_coco

TOOLS = Path(__file__).resolve().parent
CONFIGS = TOOLS.parent / 'configs'
MINIMUM_AP50 = 0.5
SIDE = 160  # pixels
IMAGES = dict(train=480, val=60)


class QuickstartError(RuntimeError):
    """What went wrong, in one message."""


@dataclass
class Run:
    """One of the two models, and what came out of it."""

    name: str
    config: Path
    work_dir: Path
    trainable: int = 0
    total: int = 0
    box_ap50: float = float('nan')
    mask_ap50: float = float('nan')
    seconds: float = float('nan')
    checkpoint_bytes: int = 0

    @property
    def checkpoint(self) -> Path:
        """The file that the training's ``last_checkpoint`` points to."""
        pointer = self.work_dir / 'last_checkpoint'
        if not pointer.is_file():
            raise QuickstartError(f'{self.name}: the training left no checkpoint in '
                                  f'{self.work_dir}')
        return self.work_dir / Path(pointer.read_text().strip()).name


def main(argv: list[str] | None = None) -> int:
    """Runs the quickstart; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/quickstart'),
                        help='folder for everything that is drawn and trained')
    parser.add_argument('--seed', type=int, default=0, help='seed of the drawing and of training')
    parser.add_argument('--fresh', action='store_true',
                        help='draw and pre-train anew, even if that was done before')
    args = parser.parse_args(argv)
    try:
        last_line = quickstart(args.work_dir.resolve(), args.seed, args.fresh)
    except QuickstartError as error:
        print(f'quickstart: failed: {error}', file=sys.stderr, flush=True)
        return 1
    print(last_line, flush=True)
    return 0


def quickstart(work_dir: Path, seed: int, fresh: bool) -> str:
    """All steps; returns the last line to print."""
    start = time.monotonic()
    cv2.setNumThreads(1)
    data, backbone = work_dir / 'shapes', work_dir / 'resnet18_drawn.pth'
    runs = [Run('frozen + prompts', CONFIGS / 'mask_rcnn_r18_protune_shapes.py',
                work_dir / 'prompted'),
            Run('frozen, head only', CONFIGS / 'mask_rcnn_r18_frozen_shapes.py',
                work_dir / 'head_only')]
    options = {
        'model.backbone.backbone.init_cfg.checkpoint': str(backbone),
        'train_dataloader.dataset.data_root': str(data),
        'val_dataloader.dataset.data_root': str(data),
        'test_dataloader.dataset.data_root': str(data),
        'val_evaluator.ann_file': str(data / 'val.json'),
        'test_evaluator.ann_file': str(data / 'val.json'),
        'randomness.seed': seed,
    }
    cfg_options = ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    cores = _cores()

    stamp = work_dir / 'prepared.json'
    wanted = _fingerprint(seed)
    if not fresh and backbone.is_file() and stamp.is_file() and \
            json.loads(stamp.read_text()) == wanted:
        say(f'1-2/5 the drawn data and the backbone in {work_dir} are used again')
    else:
        stamp.unlink(missing_ok=True)
        say(f'1/5 drawing {IMAGES["train"]} images to train on, {IMAGES["val"]} others to test on')
        for split, number in IMAGES.items():
            write_coco(data, split, number, SIDE, seed)
        say('2/5 pre-training a ResNet-18 of half the usual width to tell rings, arrows and '
            'letters on cloudy grounds apart')
        run_all([('pre-training', work_dir / 'pretraining.log', [
            TOOLS / 'quickstart_pretrain.py', runs[0].config, '--out', backbone, '--seed', seed])],
            threads=cores)
        stamp.write_text(json.dumps(wanted))

    for run in runs:
        (run.work_dir / 'last_checkpoint').unlink(missing_ok=True)
    say('3/5 training Mask R-CNN on the frozen backbone, with prompts and without')
    threads = max(1, cores // len(runs))
    seconds = run_all([(run.name, run.work_dir.with_suffix('.log'), [
        TOOLS / 'train.py', run.config, '--work-dir', run.work_dir, *cfg_options])
        for run in runs], threads)
    for run, run.seconds in zip(runs, seconds):
        run.checkpoint_bytes = run.checkpoint.stat().st_size

    say('4/5 evaluating both checkpoints')
    run_all([(run.name, run.work_dir.with_suffix('.test.log'), [
        TOOLS / 'test.py', run.config, run.checkpoint, '--work-dir', run.work_dir / 'test',
        *cfg_options]) for run in runs], threads)
    for run in runs:
        run.box_ap50, run.mask_ap50 = read_ap50(run.work_dir / 'test')

    say('5/5 drawing predictions')
    from quickstart_report import draw, load
    models = [load(run.config, run.checkpoint, options) for run in runs]
    for run, model in zip(runs, models):
        run.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.total = sum(p.numel() for p in model.parameters())
    picture = work_dir / 'predictions.png'
    draw(picture, data, [run.name for run in runs], models)

    print(f'\n{table(runs)}\n')
    say(f'predictions beside the ground truth: {picture}')
    say(f'{time.monotonic() - start:.0f} seconds in all, on {cores} cores')
    return verdict(runs[0])


def verdict(run: Run) -> str:
    """The last line for the prompted run.

    Raises:
        QuickstartError: Its mask AP50 is below ``MINIMUM_AP50``, or not a number.
    """
    if not run.mask_ap50 >= MINIMUM_AP50:
        raise QuickstartError(f'mask AP50 of "{run.name}" is {run.mask_ap50:.3f}, expected at '
                              f'least {MINIMUM_AP50}')
    return (f'quickstart: ok mask_AP50={run.mask_ap50:.3f} trainable={run.trainable} '
            f'checkpoint_bytes={run.checkpoint_bytes}')


def table(runs: list[Run]) -> str:
    """All runs as one table, AP50 from 0 to 1."""
    head = ('', 'trainable', 'parameters', 'box AP50', 'mask AP50', 'seconds', 'checkpoint bytes')
    rows = [head, *((run.name, f'{run.trainable:,}', f'{run.total:,}', f'{run.box_ap50:.3f}',
                     f'{run.mask_ap50:.3f}', f'{run.seconds:.0f}', f'{run.checkpoint_bytes:,}')
                    for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


def read_ap50(work_dir: Path) -> tuple[float, float]:
    """Box and mask AP50 (0..1) that ``tools/test.py`` left in ``work_dir``."""
    for file in sorted(work_dir.glob('*/*.json'), reverse=True):
        metrics = json.loads(file.read_text())
        with contextlib.suppress(KeyError):
            return metrics['coco/bbox_mAP_50'], metrics['coco/segm_mAP_50']
    raise QuickstartError(f'no box and mask AP50 in the JSON files under {work_dir}')


def run_all(commands: list[tuple[str, Path, list]], threads: int) -> list[float]:
    """Runs Python scripts at the same time, shows their progress and keeps their output.

    Args:
        commands (list): Per script what to call it, its log file, and its path and arguments.
        threads (int): Threads for each. More than there are cores would make them wait for
            each other at every step.

    Returns:
        list[float]: Seconds that each took.

    Raises:
        QuickstartError: One failed; the rest are stopped.
    """
    # Passive: a thread that waits leaves its core to the others.
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads),
               OMP_WAIT_POLICY='PASSIVE', PYTHONUNBUFFERED='1')
    start = time.monotonic()
    started, seconds = [], [0.] * len(commands)
    try:
        for name, log, command in commands:
            log.parent.mkdir(parents=True, exist_ok=True)
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], env=env, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, encoding='utf-8', errors='replace')
            reader = threading.Thread(target=_follow, args=(name, log, process), daemon=True)
            reader.start()
            started.append((process, reader))
        running = set(range(len(commands)))
        while running:
            time.sleep(0.1)
            for i in list(running):
                if started[i][0].poll() is None:
                    continue
                running.remove(i)
                seconds[i] = time.monotonic() - start
                started[i][1].join(timeout=10)
                if started[i][0].returncode:
                    name, log, command = commands[i]
                    raise QuickstartError(
                        f'{name}: {Path(command[0]).name} ended with status '
                        f'{started[i][0].returncode}. The end of {log}:\n{_tail(log)}')
    finally:
        for process, _ in started:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return seconds


_EPOCH = re.compile(r'Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: (\S+).*?loss: ([\d.]+)')
_RESULT = re.compile(r'(accuracy|bbox_mAP_50|segm_mAP_50): ([\d.]+)')


def _follow(name: str, log: Path, process: subprocess.Popen) -> None:
    """Copies a process's output into its log, and a few lines of it to the screen."""
    with open(log, 'w', encoding='utf-8') as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            found = _EPOCH.search(line)
            if found:
                epoch, step, steps, eta, loss = found.groups()
                say(f'    {name:18} epoch {epoch}  step {step:>3}/{steps}  loss {loss}  '
                    f'{eta} to go')
            elif 'Epoch(val)' in line or 'Epoch(test)' in line:
                results = _RESULT.findall(line)
                if results:
                    say(f'    {name:18} ' + '  '.join(f'{key} {value}' for key, value in results))


def _tail(log: Path, number: int = 20) -> str:
    return '\n'.join(log.read_text(encoding='utf-8', errors='replace').splitlines()[-number:])


def _fingerprint(seed: int) -> dict:
    """What the drawn data and the backbone depend on."""
    sources = [TOOLS / 'quickstart_data.py', TOOLS / 'quickstart_pretrain.py',
               CONFIGS / '_base_' / 'mask_rcnn_r18_shapes.py']
    digest = hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()
    return dict(seed=seed, side=SIDE, images=IMAGES, sources=digest)


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


if __name__ == '__main__':
    sys.exit(main())
