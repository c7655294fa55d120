"""A page on which several tasks of one frozen trunk look at a picture.

It shows what each task finds, how long it took and how much memory the trunk holds, and where in
the picture prompts act. Needs gradio, the extra `demo`.
"""
from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmprotune import FrozenTrunk
from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.engine import cli
from mmprotune.engine.inference import Inference
from mmprotune.errors import LaunchError, MMProtuneError
from mmprotune.visualization import as_images, draw_prompt_maps, draw_result, result_visualizer

Captioned = list[tuple[np.ndarray, str]]  # what a gallery shows: RGB pictures, captions


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tasks', nargs='+', metavar='[NAME=]CHECKPOINT',
                        help="local checkpoints of prompted models; NAME defaults to the file's")
    parser.add_argument('--device', help='default: a GPU where there is one')
    parser.add_argument('--host', default='127.0.0.1',
                        help='address to listen on; 0.0.0.0 lets other machines in, all of them')
    parser.add_argument('--port', type=int, default=7860)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Shows the page until it is interrupted.

    Args:
        argv (Sequence[str], optional): Arguments; None means the command line's.
    """
    args = parse_args(argv)
    gradio = import_gradio()
    tasks = named_tasks(args.tasks)
    trunk = FrozenTrunk(device=args.device)
    for name, file in tasks.items():
        trunk.add(name, file)
    page = Page(trunk)
    print(page.shared)
    try:
        serve(gradio, page, args.host, args.port)
    except OSError as error:  # the port is taken, or the address is not this machine's
        raise LaunchError(f'--host {args.host} --port {args.port}: {error}') from error


def import_gradio():
    """gradio, without its telemetry.

    Raises:
        LaunchError: It is not installed.
    """
    os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
    try:
        import gradio
    except ImportError as error:
        raise LaunchError(f"the page needs gradio ({error}), which the extra 'demo' installs: "
                          "pip install '.[demo]'") from error
    return gradio


def named_tasks(arguments: Sequence[str]) -> dict[str, str]:
    """Files by task name.

    Raises:
        LaunchError: A file is not there, or two tasks have one name.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        name, equals, file = argument.partition('=')
        if not equals or os.path.isfile(argument):
            name, file = Path(argument).stem, argument
        cli.check_checkpoint_path(name, file)
        if name in found:
            raise LaunchError(f'two tasks are called {name!r} ({found[name]}, {file}); name them: '
                              f'NAME={file}')
        found[name] = file
    return found


# --- what the page does -----------------------------------------------------------------------


class Look(NamedTuple):
    """What the page shows of one picture.

    Attributes:
        overlays (Captioned): One a task.
        maps (Captioned): One a prompt, where they were asked for.
        times (list[list]): Rows of task, seconds in one call of all, seconds of the task alone.
    """
    overlays: Captioned
    maps: Captioned
    times: list[list]


class Page:
    """The page without its server.

    Args:
        trunk (FrozenTrunk): With its tasks.
    """

    def __init__(self, trunk: FrozenTrunk) -> None:
        self.trunk = trunk
        self.tasks = trunk.tasks
        report = trunk.report()
        self.shared = str(report)
        self.memory = _memory(report)
        self._models = {name: trunk.model(name) for name in self.tasks}
        self._parts = {name: prompted_parts(model)[0][1] for name, model in self._models.items()}
        self._visualizers = {
            name: result_visualizer(model.cfg, getattr(model, 'dataset_meta', None), f'demo-{name}')
            for name, model in self._models.items()}
        self._lock = threading.Lock()  # visualizers hold the figure that they draw

    def look(self, picture: np.ndarray | None, tasks: Sequence[str], score_thr: float = 0.3,
             maps: bool = True, apart: bool = True) -> Look:
        """Runs tasks on a picture.

        Args:
            picture (np.ndarray, optional): uint8 of shape (H, W, 3), RGB.
            tasks (Sequence[str]): Their names.
            score_thr (float): Boxes with a lower score are not drawn. Defaults to 0.3.
            maps (bool): Whether prompts are drawn. Defaults to True.
            apart (bool): Whether each task also runs alone, to compare times. Defaults to True.

        Raises:
            LaunchError: There is no picture or no task.
            TaskFailed: A task failed.
        """
        if picture is None:
            raise LaunchError('choose a picture first')
        if not tasks:
            raise LaunchError('tick at least one task')
        tasks = [name for name in self.tasks if name in tasks]
        image = np.ascontiguousarray(picture[..., ::-1])
        with self._lock:
            results, together = self._timed(image, tasks)
            alone = [self._timed(image, [name])[1] if apart else None for name in tasks]
            overlays = [
                (draw_result(self._visualizers[name], picture, results[name], score_thr), name)
                for name in tasks]
            heat = [one for name in tasks for one in self._maps(name, image)] if maps else []
        rows = [[name, None, seconds] for name, seconds in zip(tasks, alone)]
        rows.append(['together', together, sum(alone) if apart else None])
        return Look(overlays, heat, [
            [name, *(seconds and round(seconds, 3) for seconds in row)] for name, *row in rows])

    def _timed(self, image: np.ndarray, tasks: list[str]) -> tuple[dict, float]:
        start = time.perf_counter()
        results = self.trunk(image, tasks=tasks)
        if self.trunk.device.type == 'cuda':
            torch.cuda.synchronize()
        return results, time.perf_counter() - start

    def _maps(self, name: str, image: np.ndarray) -> Captioned:
        model = self._models[name]
        inference = Inference(model, model.cfg)
        batch = inference.prepare(image)
        seen = as_images(batch['inputs'], model.data_preprocessor)
        with self._parts[name].record_maps() as recorded:
            self.trunk(image, tasks=[name])
        return [(drawn, f'{name} {stage}: {strongest:.2g}')
                for _, stage, strongest, drawn in draw_prompt_maps(seen, recorded)]


def _memory(report) -> list[list]:
    """Rows of what is held, MiB here, and in separate models."""
    rows = []
    for trunk in report.trunks:
        count = len(trunk.own_bytes)
        rows.append([f'frozen {trunk.kind}', trunk.nbytes, trunk.nbytes * count])
        rows += [[f'{name}: prompts, neck, head', nbytes, nbytes]
                 for name, nbytes in trunk.own_bytes.items()]
    rows.append(['all tensors', sum(row[1] for row in rows), sum(row[2] for row in rows)])
    return [[what, *(round(nbytes / 2**20, 1) for nbytes in held)] for what, *held in rows]


# --- gradio -----------------------------------------------------------------------------------


def build(gradio, page: Page):
    """The page as gradio's ``Blocks``.

    Args:
        gradio: The module.
        page (Page): What it shows.
    """

    def run(picture, tasks, score_thr, maps, apart):
        try:
            found = page.look(picture, tasks, score_thr, maps, apart)
        except MMProtuneError as error:
            raise gradio.Error(str(error), print_exception=False) from error
        return found.overlays, found.maps, found.times

    with gradio.Blocks(title='One frozen trunk', analytics_enabled=False) as blocks:
        gradio.Markdown('# One frozen trunk, many tasks')
        with gradio.Row():
            with gradio.Column(scale=1):
                picture = gradio.Image(label='Picture', type='numpy', sources=['upload'])
                tasks = gradio.CheckboxGroup(page.tasks, value=page.tasks, label='Tasks')
                score_thr = gradio.Slider(0, 1, 0.3, step=0.05, label='Lowest score of a box')
                maps = gradio.Checkbox(True, label='Show where prompts act')
                apart = gradio.Checkbox(True, label='Also run each task alone, to compare times')
                button = gradio.Button('Run', variant='primary')
                times = gradio.Dataframe(headers=['seconds', 'one call', 'alone'], label='Time',
                                         interactive=False)
                gradio.Dataframe(page.memory, headers=['MiB', 'here', 'separate'],
                                 label='Memory', interactive=False)
            with gradio.Column(scale=2):
                overlays = gradio.Gallery(label='What the tasks find', columns=2, height=380,
                                          object_fit='contain', format='png')
                heat = gradio.Gallery(
                    label='Where prompts act, from blue (nothing) to red (the strongest there: its '
                    'share of the feature)', columns=4, height=400,
                    object_fit='contain', format='png')
                gradio.Code(page.shared, language=None, label='What the tasks share',
                            interactive=False, lines=2, wrap_lines=True)
        button.click(run, [picture, tasks, score_thr, maps, apart], [overlays, heat, times],
                     api_name='look', concurrency_limit=1)
    return blocks


def serve(gradio, page: Page, host: str, port: int, wait: bool = True):
    """Starts the server.

    Args:
        gradio: The module.
        page (Page): What it shows.
        host (str): Address to listen on.
        port (int): Where; 0 means any that is free.
        wait (bool): Whether to return only when it is interrupted. Defaults to True.

    Returns:
        tuple: gradio's ``Blocks``, and the page's address.
    """
    blocks = build(gradio, page)
    # System fonts: the default theme fetches its own from elsewhere.
    theme = gradio.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['monospace'])
    _, address, _ = blocks.launch(
        server_name=host, server_port=port or None, share=False, theme=theme, quiet=True,
        prevent_thread_lock=True, footer_links=[])
    print(f'The page: {address} (Ctrl-C ends it)', flush=True)
    if wait:
        blocks.block_thread()
    return blocks, address


if __name__ == '__main__':
    sys.exit(cli.run_tool(main))
