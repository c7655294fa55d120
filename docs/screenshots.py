"""Makes the picture of the page of tools/demo.py that docs/trunk.md shows.

Needs the extra `demo`, playwright and a Chromium.
"""
from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmprotune import FrozenTrunk

ROOT = Path(__file__).resolve().parents[1]
SIZE = (1500, 900)  # pixels


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('photo')
    parser.add_argument('tasks', nargs='+', metavar='[NAME=]CHECKPOINT')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'images' / 'demo.png')
    parser.add_argument('--browser', help="a Chromium's file; left out, playwright's own")
    return parser.parse_args(argv)


def load_demo():
    """tools/demo.py, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location('demo', ROOT / 'tools' / 'demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shoot(address: str, photo: str, browser: str | None, pictures: int) -> bytes:
    """The page after a run on a photo, which shows so many pictures more."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        view = chromium.new_page(viewport=dict(width=SIZE[0], height=SIZE[1]))
        view.goto(address)
        view.locator('input[type=file]').first.set_input_files(photo)
        view.locator('[data-testid="image"] img').first.wait_for()
        before = view.evaluate('document.images.length')
        view.get_by_role('button', name='Run').click()
        view.wait_for_function(
            'most => document.images.length >= most && [...document.images].every(i => i.complete)',
            arg=before + pictures, timeout=300_000)
        view.wait_for_timeout(2000)  # they fade in
        picture = view.screenshot(full_page=True)
        chromium.close()
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    demo = load_demo()
    trunk = FrozenTrunk(device='cpu')
    for name, file in demo.named_tasks(args.tasks).items():
        trunk.add(name, file)
    page = demo.Page(trunk)
    with Image.open(args.photo) as image:  # the first run also finds out what can be shared
        found = page.look(np.asarray(image.convert('RGB')), page.tasks)
    blocks, address = demo.serve(demo.import_gradio(), page, '127.0.0.1', 0, wait=False)
    try:
        picture = shoot(address, args.photo, args.browser, len(found.overlays) + len(found.maps))
    finally:
        blocks.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # 256 colours: a third of the bytes.
    with Image.open(io.BytesIO(picture)) as image:
        image.convert('RGB').quantize(256).save(args.out, optimize=True)
    print(f'{args.out}: {args.out.stat().st_size} bytes')


if __name__ == '__main__':
    sys.exit(main())
