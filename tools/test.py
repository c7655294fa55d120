"""Evaluates a checkpoint, slim or full, with the model and data of a config."""
from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Sequence

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.registry import HOOKS, init_default_scope

from mmprotune.engine import cli
from mmprotune.engine.runner import build_runner
from mmprotune.errors import LaunchError

# Used where a config with --tta has no tta_model of its own.
TTA_MODELS = dict(
    mmdet=dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
    mmseg=dict(type='SegTTAModel'),
    mmpretrain=dict(type='AverageClsScoreTTA'))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_arguments(parser, checkpoint=True)
    parser.add_argument(
        '--protune',
        action='store_true',
        help='the checkpoint is of a stock config that was trained with --protune')
    parser.add_argument('--out', metavar='FILE.pkl', help='write all predictions to a pickle file')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument(
        '--show-dir',
        help='draw predictions into this directory (inside the work directory for detection)')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds to show a window for')
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation: the config's, or flipping")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise LaunchError(f'--out must end with .pkl or .pickle, got {args.out!r}')
    cfg = cli.set_up(args)
    if cfg.get('test_dataloader') is None:
        raise LaunchError('test_dataloader: the config names no test set')
    if args.show or args.show_dir:
        if args.tta and cfg.get('default_scope') == 'mmpretrain':
            raise LaunchError(
                "--tta: mmpretrain's hook draws what the model saw, which are several versions of "
                'an image here; leave --show and --show-dir out')
        draw_predictions(cfg, args)
    if args.tta:
        use_tta(cfg)

    runner = build_runner(cfg)
    if args.out is not None:
        runner.test_evaluator.metrics.append(_dump_metric(cfg)(out_file_path=args.out))
    runner.test()


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turns the visualization hook on, whichever library's it is.

    Args:
        cfg (Config): The config; changed in place.
        args (argparse.Namespace): ``show``, ``show_dir`` and ``wait_time``.

    Raises:
        LaunchError: The config has no visualization hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise LaunchError(
            '--show and --show-dir need a hook that draws: the config has no '
            'default_hooks.visualization')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    cls = hook['type']
    if not isinstance(cls, type):
        with HOOKS.switch_scope_and_registry(hook.get('_scope_')) as registry:
            cls = registry.get(cls)
    if cls is None:
        raise LaunchError(
            f"default_hooks.visualization.type={hook['type']!r} is not registered")
    # The libraries' hooks do the same under different names.
    names = inspect.signature(cls.__init__).parameters
    hook['draw' if 'draw' in names else 'enable'] = True
    hook['interval'] = 1
    if args.show:
        hook['show'] = True
        hook['wait_time'] = args.wait_time
    if args.show_dir:
        for name in ('test_out_dir', 'out_dir'):
            if name in names:
                hook[name] = args.show_dir
                return
        cfg.visualizer['save_dir'] = args.show_dir


def use_tta(cfg: Config) -> None:
    """Wraps the model for test-time augmentation.

    Args:
        cfg (Config): The config; changed in place. Without ``tta_pipeline`` the test pipeline is
            run with and without a horizontal flip.

    Raises:
        LaunchError: The config has no ``tta_model``, and its library has no known one.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if cfg.get('tta_model') is None:
        scope = cfg.get('default_scope')
        if scope not in TTA_MODELS:
            raise LaunchError(
                f'--tta: the config has no tta_model, and default_scope={scope!r} is none of '
                f'{sorted(TTA_MODELS)}')
        cfg.tta_model = TTA_MODELS[scope]
    if cfg.get('tta_pipeline') is None:
        *steps, pack = copy.deepcopy(dataset.pipeline)
        if 'meta_keys' in pack:
            pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
        flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
        cfg.tta_pipeline = [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


class DumpSegResults(DumpResults):
    """Predictions without the logits: as floats of every class, a few images fill the memory."""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        super().process(data_batch, [{
            key: value
            for key, value in sample.items() if key != 'seg_logits'
        } for sample in data_samples])


def _dump_metric(cfg: Config) -> type[DumpResults]:
    """The class that writes predictions to a file, by the library of the config."""
    scope = cfg.get('default_scope')
    if scope == 'mmdet':
        from mmdet.evaluation import DumpDetResults
        return DumpDetResults
    return DumpSegResults if scope == 'mmseg' else DumpResults


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
