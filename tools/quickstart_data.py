"""Draws the two data sets of the quickstart from a seed, so that nothing has to be downloaded.

``pretraining_image`` draws one motif on a cloudy ground and is classified; ``write_coco`` draws
scenes of other shapes that overlap, on grounds full of stripes, dots or checks, and writes them as
a COCO instance segmentation set. The two tasks share no class, and a backbone that was trained on
the first one sees edges all over the second one's grounds.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

SHAPES = ('disc', 'square', 'triangle', 'star', 'cross')
MOTIFS = ('ring', 'crescent', 'arrow', 'zigzag', 'hourglass', 'letter-E', 'letter-H', 'letter-L')
TEXTURES = ('stripes', 'dots', 'checks')

# Every image has a random stream of its own, (seed, split, index): splits never share an image,
# and a longer set begins with the shorter one.
_STREAMS = {'pretrain': 0, 'pretrain-val': 1, 'train': 2, 'val': 3}


def stream(seed: int, split: str, index: int) -> np.random.Generator:
    """Random generator of one image of one split ('pretrain', 'pretrain-val', 'train', 'val')."""
    return np.random.default_rng([seed, _STREAMS[split], index])


# --- outlines: lists of closed polygons (K, 2) in [-1, 1]; polygons inside others are holes ---

def _arc(start: float, stop: float, radius: float = 1., number: int = 40) -> np.ndarray:
    angle = np.linspace(start, stop, number, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _strokes(*cells: str) -> list[np.ndarray]:
    """Outline of a letter drawn as '#' on a grid, one string a row."""
    grid = np.array([[cell == '#' for cell in row] for row in cells], dtype=np.uint8)
    big = cv2.resize(np.pad(grid, 1), None, fx=16, fy=16, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    half = 16 * max(grid.shape) / 2
    centre = np.array(big.shape[::-1]) / 2
    return [(contour[:, 0] - centre) / half for contour in contours]


def _crescent() -> np.ndarray:
    outer = _arc(0.25 * np.pi, 1.75 * np.pi)
    inner = _arc(1.65 * np.pi, 0.35 * np.pi, 0.75) + [0.3, 0.]
    return np.concatenate([outer, inner])


_OUTLINES: dict[str, Callable[[], list[np.ndarray]]] = {
    'disc': lambda: [_arc(0, 2 * np.pi)],
    'square': lambda: [_arc(0, 2 * np.pi, number=4)],
    'triangle': lambda: [_arc(0, 2 * np.pi, number=3)],
    'star': lambda: [np.stack([_arc(0, 2 * np.pi, number=5),
                               _arc(0.2 * np.pi, 2.2 * np.pi, 0.42, 5)], 1).reshape(-1, 2)],
    'cross': lambda: _strokes('.#.', '###', '.#.'),
    'ring': lambda: [_arc(0, 2 * np.pi), _arc(0, 2 * np.pi, 0.55)],
    'crescent': lambda: [_crescent()],
    'arrow': lambda: [np.array([[-1, -.25], [.1, -.25], [.1, -.75], [1, 0],
                                [.1, .75], [.1, .25], [-1, .25]])],
    'zigzag': lambda: [np.array([[-1, -.1], [-.35, -.75], [.3, -.1], [1, -.8], [1, -.1], [.3, .65],
                                 [-.35, 0], [-1, .7]])],
    'hourglass': lambda: [np.array([[-.8, -1], [.8, -1], [.15, 0], [.8, 1], [-.8, 1], [-.15, 0]])],
    'letter-E': lambda: _strokes('####', '#...', '###.', '#...', '####'),
    'letter-H': lambda: _strokes('#..#', '#..#', '####', '#..#', '#..#'),
    'letter-L': lambda: _strokes('#...', '#...', '#...', '#...', '####'),
}


def _coverage(name: str, side: int, centre: np.ndarray, radius: float,
              rng: np.random.Generator) -> np.ndarray:
    """One rotated and slightly stretched shape as anti-aliased coverage (side, side), uint8."""
    angle = rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    stretch = np.diag([1., rng.uniform(0.75, 1.)])
    matrix = radius * np.array([[cos, -sin], [sin, cos]]) @ stretch
    polygons = [np.round((points @ matrix.T + centre) * 16).astype(np.int32)
                for points in _OUTLINES[name]()]
    canvas = np.zeros((side, side), np.uint8)
    cv2.fillPoly(canvas, polygons, 255, cv2.LINE_AA, shift=4)
    return canvas


# --- colour ---

def _clouds(side: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of mean 0 and about unit amplitude, (side, side) float32."""
    total = np.zeros((side, side), np.float32)
    for cells, weight in ((3, 1.), (8, .6), (side // 5, .4)):
        noise = rng.standard_normal((cells, cells)).astype(np.float32)
        total += weight * cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return total


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
    """Cloudy two-coloured ground, (side, side, 3) float32 in 0..255."""
    dark, light = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    share = 1 / (1 + np.exp(-1.5 * _clouds(side, rng)[..., None]))
    return dark + share * (light - dark)


def _colour_unlike(colour: np.ndarray, rng: np.random.Generator,
                   difference: float = 70) -> np.ndarray:
    """A colour (3,) that can be told from ``colour``: by more than this in one channel."""
    while True:
        candidate = rng.uniform(0, 255, 3).astype(np.float32)
        if np.abs(candidate - colour).max() > difference:
            return candidate


def _paint(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Lay ``colour``, (3,) or (H, W, 3), over ``image`` where ``coverage`` says so, in place."""
    alpha = coverage[..., None].astype(np.float32) / 255
    image += alpha * (colour - image)


def _camera(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur at times, always noise, and round to uint8."""
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.))
    image = image + rng.normal(0, rng.uniform(3, 14), image.shape).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _texture(name: str, side: int, first: np.ndarray, second: np.ndarray,
             rng: np.random.Generator) -> np.ndarray:
    """Two-coloured pattern (side, side, 3), turned at random."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 9)
    y, x = np.mgrid[:side, :side].astype(np.float32)
    u = 2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 6)
    v = 2 * np.pi / period * (y * np.cos(angle) - x * np.sin(angle)) + rng.uniform(0, 6)
    wave = {'stripes': np.sin(u), 'checks': 2 * np.sin(u) * np.sin(v),
            'dots': np.cos(u) + np.cos(v) - 0.6}[name]
    share = np.clip(0.5 + 1.5 * wave, 0, 1)[..., None]
    return first + share * (second - first)


# --- the two tasks ---

def pretraining_image(label: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """One plainly coloured motif, ``MOTIFS[label]``, BGR uint8 (side, side, 3)."""
    image = _background(side, rng)
    radius = side * rng.uniform(0.28, 0.48)
    centre = side / 2 + rng.uniform(-1, 1, 2) * (side / 2 - radius)
    colour = _colour_unlike(image.mean((0, 1)), rng)
    _paint(image, _coverage(MOTIFS[label], side, centre, radius, rng), colour)
    return _camera(image, rng)


def scene(side: int, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """A scene of two to five overlapping shapes on a textured ground.

    Returns:
        tuple: The image, BGR uint8 (side, side, 3), and per shape its index in ``SHAPES`` and the
        bool mask (side, side) of what can be seen of it.
    """
    first = rng.uniform(0, 255, 3).astype(np.float32)
    image = _texture(str(rng.choice(TEXTURES)), side, first, _colour_unlike(first, rng, 130), rng)

    shapes: list[tuple[int, np.ndarray]] = []
    areas: list[int] = []
    wanted = rng.integers(2, 6)
    for _ in range(40):
        if len(shapes) == wanted:
            break
        label = int(rng.integers(len(SHAPES)))
        radius = side * rng.uniform(0.09, 0.24)
        centre = rng.uniform(0.7 * radius, side - 0.7 * radius, 2)
        coverage = _coverage(SHAPES[label], side, centre, radius, rng)
        mask = coverage > 127
        left = [seen & ~mask for _, seen in shapes]
        # A shape may hide a good part of another, yet not so much that nobody could name it.
        if any(seen.sum() < 0.6 * area for seen, area in zip(left, areas)):
            continue
        shapes = [(known, seen) for (known, _), seen in zip(shapes, left)]
        shapes.append((label, mask))
        areas.append(int(mask.sum()))
        ground = image[mask].mean(0)
        shade = 1 + 0.12 * _clouds(side, rng)[..., None]
        _paint(image, coverage, _colour_unlike(ground, rng) * shade)
    return _camera(image, rng), shapes


def write_coco(root: Path, split: str, number: int, side: int, seed: int) -> Path:
    """Draw ``number`` scenes into ``root/split`` and describe them in ``root/split.json``.

    Masks are compressed RLE; areas and boxes are those of the masks, in pixels.

    Returns:
        Path: The annotation file.
    """
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(number):
        image, shapes = scene(side, stream(seed, split, index))
        name = f'{index:05d}.png'
        if not cv2.imwrite(str(folder / name), image):
            raise OSError(f'could not write {folder / name}')
        images.append(dict(id=index + 1, file_name=name, width=side, height=side))
        for label, mask in shapes:
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            annotations.append(dict(
                id=len(annotations) + 1, image_id=index + 1, category_id=label + 1, iscrowd=0,
                area=float(coco_mask.area(rle)), bbox=coco_mask.toBbox(rle).tolist(),
                segmentation=dict(size=rle['size'], counts=rle['counts'].decode())))
    file = root / f'{split}.json'
    file.write_text(json.dumps(dict(
        info=dict(description='shapes drawn by tools/quickstart.py', seed=seed, split=split),
        licenses=[], images=images, annotations=annotations,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(SHAPES)])))
    return file
