"""Draws the figures of the pages: ``python docs/figures/draw.py`` writes the SVG files beside it.

They depend on this file, and the chart on docs/results/methods_camvid_r18_1200.json, alone; a test
compares the files with what is drawn. Sizes are in pixels of the SVG's own frame.
"""
from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / 'results' / 'methods_camvid_r18_1200.json'
# Fill and line of what is frozen, of what trains, and of what is neither.
FROZEN, TRAINS, PLAIN = ('#dce6f2', '#6b83a8'), ('#ffdcb3', '#d27a1e'), ('#f4f4f4', '#8a8a8a')
INK, GRADIENT = '#2b2b2b', '#c0392b'
MIB = 2**20


class Picture:
    """An SVG picture, put together piece by piece."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = width, height
        self.title = title
        self.pieces: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, text: str = '',
            look: tuple[str, str] = PLAIN, size: int = 14) -> None:
        """A rectangle with lines of text in its middle."""
        self.pieces.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" '
            f'fill="{look[0]}" stroke="{look[1]}" stroke-width="1.5"/>')
        lines = text.split('\n') if text else []
        for i, line in enumerate(lines):
            below = (i - (len(lines) - 1) / 2) * size * 1.25
            self.text(x + width / 2, y + height / 2 + below + size * 0.35, line, size=size)

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = 'middle',
             color: str = INK, bold: bool = False) -> None:
        weight = ' font-weight="bold"' if bold else ''
        self.pieces.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{color}"{weight}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], color: str = INK, dashed: bool = False,
              head: bool = True) -> None:
        """A line through points, with a head at its end."""
        path = ' '.join(f'{x:g},{y:g}' for x, y in points)
        dashes = ' stroke-dasharray="6 4"' if dashed else ''
        name = 'red' if color == GRADIENT else 'ink'
        end = f' marker-end="url(#{name})"' if head else ''
        self.pieces.append(f'<polyline points="{path}" fill="none" stroke="{color}" '
                           f'stroke-width="1.6"{dashes}{end}/>')

    def dot(self, x: float, y: float, radius: float, fill: str, line: str = INK) -> None:
        self.pieces.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}" '
                           f'stroke="{line}" stroke-width="1.5"/>')

    def plus(self, x: float, y: float) -> None:
        self.dot(x, y, 9, '#ffffff')
        self.arrow((x - 5, y), (x + 5, y), head=False)
        self.arrow((x, y - 5), (x, y + 5), head=False)

    def legend(self, x: float, y: float) -> None:
        for look, text in ((FROZEN, 'frozen'), (TRAINS, 'trains')):
            self.box(x, y, 16, 12, look=look)
            self.text(x + 22, y + 11, text, size=13, anchor='start')
            x += 84

    def svg(self) -> str:
        width, height = self.size
        heads = ''.join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>'
            for name, color in (('ink', INK), ('red', GRADIENT)))
        return '\n'.join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">',
            f'<title>{escape(self.title)}</title>',
            f'<defs>{heads}</defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *self.pieces, '</svg>', ''])


def method() -> Picture:
    """Stages, prompts between them, neck and head, and where gradients go."""
    picture = Picture(860, 250, 'A frozen backbone with a prompt at the end of each stage; '
                                'prompts, neck and head train')
    picture.box(12, 62, 56, 44, 'image')
    x, y = 68, 84
    for i in range(1, 5):
        picture.arrow((x, y), (x + 22, y))
        picture.box(x + 22, 58, 76, 52, f'stage {i}', FROZEN)
        picture.arrow((x + 98, y), (x + 123, y))
        picture.box(x + 84, 142, 48, 34, f'P{i}', TRAINS)
        picture.arrow((x + 108, y), (x + 108, 142))
        picture.arrow((x + 132, 159), (x + 144, 159), (x + 144, y + 22), (x + 136, y + 9))
        picture.plus(x + 132, y)
        x += 141
    picture.arrow((x, y), (x + 24, y))
    picture.box(x + 24, 50, 100, 68, 'neck\nand head', TRAINS)
    picture.arrow((x + 124, y), (x + 146, y))
    picture.text(x + 150, y + 5, 'loss', anchor='start')
    picture.legend(12, 18)
    picture.text(852, 29, 'x + P(x) goes on to the next stage and to the neck', size=13,
                 anchor='end')
    picture.arrow((x + 74, 118), (x + 74, 206), (190, 206), color=GRADIENT, dashed=True)
    picture.text(424, 228, 'gradients pass through frozen stages to the prompts', size=13,
                 color=GRADIENT)
    picture.text(98, 204, 'no graph below P1,', size=13, color=GRADIENT)
    picture.text(98, 222, 'nothing kept', size=13, color=GRADIENT)
    return picture


def frozen() -> Picture:
    """One model before and after training."""
    picture = Picture(760, 230, 'The digest of the frozen tensors is the same before and after '
                                'training; prompts and head change')
    for x, title, prompts, head in ((20, 'step 0', 'prompts: 0', 'head: random'),
                                    (400, 'after training', 'prompts', 'head')):
        picture.text(x + 170, 26, title, bold=True)
        picture.box(x, 44, 170, 110, 'what the\npre-trained file filled', FROZEN)
        picture.box(x + 180, 44, 160, 50, prompts, TRAINS)
        picture.box(x + 180, 104, 160, 50, head, TRAINS)
        picture.text(x + 85, 178, 'SHA-256 3f9a…c1', size=13)
    picture.arrow((364, 99), (394, 99))
    picture.arrow((170, 174), (420, 174), head=False, dashed=True)
    picture.text(295, 192, 'equal, or the run stops', size=13)
    picture.legend(20, 204)
    picture.text(740, 215, 'norms, dropout and drop path of frozen layers stand still', size=13,
                 anchor='end')
    return picture


def prompts() -> Picture:
    """The block that computes a prompt."""
    picture = Picture(820, 210, 'A prompt block: 1x1 convolution to a quarter of the channels, 5x5 '
                                'depthwise, GELU, 1x1 back; added to the feature')
    picture.legend(12, 14)
    picture.box(12, 54, 90, 56, 'frozen\nstage', FROZEN)
    picture.arrow((102, 82), (676, 82))
    picture.text(150, 74, 'x, C channels', size=13)
    picture.arrow((220, 82), (220, 150), (248, 150))
    x = 248
    for text in ('1x1\nC to C/4', '5x5\ndepthwise', 'GELU', '1x1\nC/4 to C'):
        width = 76 if text == 'GELU' else 96
        picture.box(x, 126, width, 48, text, TRAINS, size=13)
        x += width
        picture.arrow((x, 150), (x + 18, 150))
        x += 18
    picture.arrow((x, 150), (686, 150), (686, 93))
    picture.text(716, 132, 'P(x)', size=13)
    picture.plus(686, 82)
    picture.arrow((695, 82), (724, 82))
    picture.box(724, 54, 84, 56, 'next\nstage', FROZEN)
    picture.text(450, 74, 'starts as the frozen backbone: P(x) = 0', size=13)
    picture.text(450, 198, 'one at each stage end (as here), in each branch, or on the outputs',
                 size=13)
    return picture


def lean() -> Picture:
    """What the backward pass keeps of four frozen layers."""
    picture = Picture(760, 220, 'What is kept of frozen layers for the backward pass: by PyTorch '
                                'the inputs, by lean layers one bit an element of ReLU')
    layers = [('conv', 'its input', 'nothing'), ('norm', 'its input', 'nothing'),
              ('ReLU', 'its output', '1 bit each'), ('conv', 'its input', 'nothing')]
    picture.text(20, 130, 'ordinary layers keep', anchor='start', bold=True, size=13)
    picture.text(20, 186, 'lean layers keep', anchor='start', bold=True, size=13)
    x = 180
    for i, (name, ordinary, lean_) in enumerate(layers):
        picture.box(x, 34, 100, 46, name, FROZEN)
        if i:
            picture.arrow((x - 40, 57), (x, 57))
        picture.box(x, 104, 100, 42, ordinary, ('#f6cfca', GRADIENT), size=13)
        if lean_ == 'nothing':
            picture.text(x + 50, 186, lean_, size=13)
        else:
            picture.box(x, 176, 100, 14, look=('#f6cfca', GRADIENT))
            picture.text(x + 50, 206, lean_, size=13)
        x += 140
    picture.arrow((140, 57), (180, 57))
    picture.text(20, 62, 'frozen layers', anchor='start', size=13, bold=True)
    picture.text(460, 20, 'same outputs, same gradients to rounding', size=13)
    return picture


def slim() -> Picture:
    """A full file, a slim one, and what it loads on."""
    picture = Picture(780, 220, 'A slim checkpoint leaves out the frozen tensors and carries their '
                                'digest; it loads on the same backbone alone')
    picture.text(120, 26, 'full checkpoint', bold=True)
    picture.box(20, 40, 140, 120, 'frozen\nbackbone', FROZEN)
    picture.box(160, 40, 60, 120, 'prompts,\nneck,\nhead', TRAINS, size=12)
    picture.text(390, 26, 'slim checkpoint', bold=True)
    picture.arrow((228, 100), (322, 100))
    picture.text(275, 90, 'extract', size=12)
    picture.arrow((322, 124), (228, 124))
    picture.text(275, 142, 'merge', size=12)
    picture.box(330, 40, 60, 120, 'prompts,\nneck,\nhead', TRAINS, size=12)
    picture.box(390, 40, 76, 120, 'SHA-256\nof what is\nfrozen,\nclasses', PLAIN, size=12)
    picture.arrow((474, 80), (540, 66))
    picture.box(546, 40, 214, 48, 'the same backbone: loads', FROZEN, size=13)
    picture.arrow((474, 120), (540, 134), color=GRADIENT)
    picture.box(546, 112, 214, 48, 'another one: refused', ('#f6cfca', GRADIENT), size=13)
    picture.text(390, 200, 'read without running anything in it, written whole or not at all',
                 size=13)
    return picture


def trunk() -> Picture:
    """One frozen backbone for three tasks."""
    picture = Picture(760, 250, 'Three tasks on one frozen backbone: it is in memory once and runs '
                                'once for an image')
    picture.legend(20, 14)
    picture.box(20, 100, 80, 50, 'image')
    picture.arrow((100, 125), (140, 125))
    picture.box(140, 70, 180, 110, 'one frozen trunk:\nin memory once,\nrun once an image', FROZEN)
    for y, name, result in ((40, 'people', 'boxes'), (104, 'road', 'a map'),
                            (168, 'weather', 'a class')):
        picture.arrow((320, 125), (390, y + 22))
        picture.box(390, y, 100, 44, 'prompts', TRAINS)
        picture.arrow((490, y + 22), (514, y + 22))
        picture.box(514, y, 110, 44, 'neck, head', TRAINS)
        picture.arrow((624, y + 22), (650, y + 22))
        picture.text(656, y + 19, name, anchor='start', bold=True)
        picture.text(656, y + 36, result, anchor='start', size=13)
    picture.text(380, 238, 'each result is bitwise that of the model alone', size=13)
    return picture


NAMES = dict(
    full='full fine-tuning', full_slow='full, backbone at 0.1 of the rate', head='head only',
    stages='prompts at stage ends', branches='prompts in the branches')


def accuracy_memory() -> Picture:
    """mIoU against what the backward pass keeps, of the comparison on CamVid."""
    content = json.loads(RESULTS.read_text(encoding='utf-8'))
    methods = [m for m in content['methods'] if m['method'] in NAMES]
    width, height, left, bottom = 700, 400, 64, 340
    picture = Picture(width, height, 'mIoU on CamVid against MiB kept for the backward pass: '
                      + '; '.join(f'{NAMES[m["method"]]} {m["mean"]:.1f}, {m["kept"] / MIB:.0f} MiB'
                                  for m in methods))
    low = int(min(m['mean'] - m['sd'] for m in methods))
    high = int(max(m['mean'] + m['sd'] for m in methods)) + 1
    most = (int(max(m['kept'] for m in methods) / MIB) // 50 + 1) * 50

    def at(kept: float, score: float) -> tuple[float, float]:
        return (left + (width - left - 60) * kept / MIB / most,
                bottom - (bottom - 40) * (score - low) / (high - low))

    for score in range(low, high + 1):
        x, y = at(0, score)
        picture.arrow((x, y), (width - 60, y), color='#e2e2e2', head=False)
        picture.text(x - 8, y + 5, str(score), anchor='end', size=13)
    for kept in range(0, most + 1, 50):
        x, _ = at(kept * MIB, low)
        picture.text(x, bottom + 20, str(kept), size=13)
    picture.arrow((left, bottom), (width - 60, bottom), head=False)
    picture.text(left, 22, 'mIoU, mean and deviation of three seeds', anchor='start', size=13)
    picture.text(left + (width - left - 60) / 2, bottom + 44,
                 'MiB kept for the backward pass of a step of batch 4', size=13)
    for entry in methods:
        look = TRAINS if entry['method'] in ('stages', 'branches') else FROZEN
        x, top = at(entry['kept'], entry['mean'] + entry['sd'])
        _, low_end = at(entry['kept'], entry['mean'] - entry['sd'])
        _, y = at(entry['kept'], entry['mean'])
        picture.arrow((x, top), (x, low_end), color=look[1], head=False)
        picture.dot(x, y, 6, look[0], look[1])
        right = x > width * 0.6
        picture.text(x + (-12 if right else 12), y + 5, NAMES[entry['method']], size=13,
                     anchor='end' if right else 'start')
    return picture


FIGURES = (method, frozen, prompts, lean, slim, trunk, accuracy_memory)


def main() -> None:
    """Writes every figure."""
    for figure in FIGURES:
        (HERE / f'{figure.__name__}.svg').write_text(figure().svg(), encoding='utf-8')


if __name__ == '__main__':
    main()
