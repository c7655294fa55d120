"""How the features of a backbone are laid out: maps, channels first or last, and tokens."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_MAX_EXTRA_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """How one feature tensor is laid out.

    Attributes:
        kind (str): 'NCHW', 'NHWC' or 'NLC'.
        channels (int): Channels.
        stride (float): Input pixels per feature pixel, rounded to what the dry run shows.
        extra_tokens (int): Leading tokens of an 'NLC' tensor that belong to no pixel (class,
            distillation, register tokens).
    """
    kind: str
    channels: int
    stride: float
    extra_tokens: int = 0


def token_grid(length: int, image: tuple[int, int], stride: float,
               extra: int) -> tuple[int, int] | None:
    """Height and width of the grid behind ``length`` tokens, ``extra`` of which are no pixels.

    Args:
        length (int): Number of tokens.
        image (tuple[int, int]): Height and width of the input, pixels.
        stride (float): Input pixels per token.
        extra (int): Tokens that belong to no pixel.

    Returns:
        tuple[int, int], optional: (H, W) with ``H * W == length - extra``; None when no grid near
        the image's proportions has that many cells.
    """
    cells = length - extra
    if cells < 1:
        return None
    step = int(stride)
    if step == stride and image[0] % step == 0 and image[1] % step == 0 and \
            (image[0] // step) * (image[1] // step) == cells:
        # No other grid is nearer; and a compiler can record this, whatever the size.
        return image[0] // step, image[1] // step
    options = []
    for side, other in ((0, 1), (1, 0)):
        exact = image[side] / stride
        for n in {math.floor(exact), math.ceil(exact), math.floor(exact) + 1}:
            if n >= 1 and cells % n == 0:
                grid = (n, cells // n) if side == 0 else (cells // n, n)
                options.append((abs(grid[other] - image[other] / stride), grid))
    error, grid = min(options, default=(math.inf, None))
    return grid if error < 2 else None


def describe(tensor: Tensor, image: tuple[int, int], batch: int) -> Layout | None:
    """Recognises the layout of a feature tensor.

    Args:
        tensor (Tensor): Any tensor that a module returned for images of shape (N, 3, H, W).
        image (tuple[int, int]): H and W, pixels.
        batch (int): N.

    Returns:
        Layout, optional: None when the tensor is no feature map or token sequence of the batch.
    """
    if not torch.is_floating_point(tensor) or tensor.dim() not in (3, 4) or len(tensor) != batch:
        return None
    if tensor.dim() == 4:
        options = []
        for kind, (h, w), channels in (('NCHW', tensor.shape[2:], tensor.shape[1]),
                                       ('NHWC', tensor.shape[1:3], tensor.shape[3])):
            if not (1 <= h <= image[0] and 1 <= w <= image[1]):
                continue
            stride = _round_stride(math.sqrt(image[0] / h * image[1] / w))
            if all(abs(n - side / stride) < 1.5 for n, side in ((h, image[0]), (w, image[1]))):
                # The image's proportions tell which two axes are the spatial ones.
                skew = abs(math.log(image[0] / h * w / image[1]))
                options.append((skew, kind, channels, stride))
        if not options:
            return None
        _, kind, channels, stride = min(options, key=lambda option: option[0])
        return Layout(kind, channels, stride)
    length, channels = tensor.shape[1:]
    for extra in range(_MAX_EXTRA_TOKENS + 1):
        for stride in (1, 2, 4, 7, 8, 14, 16, 28, 32, 64):
            exact = math.ceil(image[0] / stride) * math.ceil(image[1] / stride)
            if exact + extra == length:
                return Layout('NLC', channels, stride, extra)
    return None


def _round_stride(stride: float) -> float:
    """Snaps to a power of two when close: odd sizes make 64 / 17 out of a stride of 4."""
    power = 2.0**round(math.log2(stride))
    return power if abs(stride / power - 1) < 0.2 else round(stride, 2)


def as_map(layout: Layout, x: Tensor, arguments: Iterable,
           grid_of: Callable[[], tuple[int, int]]) -> tuple[Callable, Callable]:
    """The way from a feature to (N, C, H, W), and the way back for its prompt.

    Args:
        layout (Layout): Of the feature.
        x (Tensor): The feature.
        arguments (Iterable): What the module that computed it was called with; a pair of ints among
            them that fits the number of tokens is taken for the token grid.
        grid_of (Callable): Height and width of that grid otherwise.

    Returns:
        tuple[Callable, Callable]: Both take a tensor and return one. Extra tokens have no place in
        a map, and a prompt of zero.
    """
    if layout.kind == 'NCHW':
        return _unchanged, _unchanged
    if layout.kind == 'NHWC':
        return _channels_first, _channels_last
    extra = layout.extra_tokens
    height, width = next(
        (a for a in arguments if isinstance(a, (tuple, list)) and len(a) == 2
         and all(isinstance(n, int) for n in a) and a[0] * a[1] == x.size(1) - extra),
        None) or grid_of()

    def to_map(x: Tensor) -> Tensor:
        return x[:, extra:].transpose(1, 2).reshape(x.size(0), x.size(2), height, width)

    def from_map(prompt: Tensor) -> Tensor:
        tokens = prompt.flatten(2).transpose(1, 2)
        return F.pad(tokens, (0, 0, extra, 0)) if extra else tokens

    return to_map, from_map


def _unchanged(x: Tensor) -> Tensor:
    return x


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
