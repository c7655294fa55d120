"""Shows where prompts act on images, and what a model predicts with and without them.

For each image and each prompt, OUT gets a picture: the norm of the prompt over that of the feature
that it is added to, at each pixel, from blue (nothing) to red (the strongest value of that picture,
which the log tells). With --compare also the predictions, without prompts at the left, with them at
the right.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mmprotune import FrozenTrunk
from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.engine import cli
from mmprotune.engine.inference import Inference, check_image
from mmprotune.visualization import as_images, draw_prompt_maps, draw_result, result_visualizer


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help="the checkpoint's config; '-' takes the one in it")
    parser.add_argument('checkpoint', help='local checkpoint of a prompted model')
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR')
    parser.add_argument('--compare', action='store_true',
                        help='predictions with and without prompts, too')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    from mmcv.image import imread
    images = [check_image(image) for image in args.images]
    trunk = FrozenTrunk(device=args.device)
    trunk.add('model', args.checkpoint, None if args.config == '-' else args.config)
    model = trunk.model('model')
    (_, part), = prompted_parts(model)
    inference = Inference(model, model.cfg)
    visualizer = None
    if args.compare:
        visualizer = result_visualizer(
            model.cfg, getattr(model, 'dataset_meta', None), 'show_prompts')
    args.out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        batch = inference.prepare(image)
        seen = as_images(batch['inputs'], model.data_preprocessor)
        with torch.no_grad():
            with part.record_maps() as recorded:
                prompted = model.test_step(batch)[0]
            with part.without_prompts():
                plain = model.test_step(inference.prepare(image))[0]
        name = f'{number}_{Path(image).stem}'
        for _, stage, strongest, picture in draw_prompt_maps(seen, recorded):
            file = args.out / f'{name}_{stage}.png'
            _save(file, picture)
            print(f'{file}: at most {strongest:.3g} of the feature')
        if visualizer is not None:
            file = args.out / f'{name}_compared.png'
            photo = imread(image, channel_order='rgb')
            _save(file, np.concatenate(
                [draw_result(visualizer, photo, result) for result in (plain, prompted)], axis=1))
            print(f'{file}: without prompts, with prompts')


def _save(file: Path, picture: np.ndarray) -> None:
    from mmcv.image import imwrite
    imwrite(np.ascontiguousarray(picture[..., ::-1]), str(file))


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
