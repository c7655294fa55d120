"""What a prompted backbone computes, as a few numbers to compare.

Equal weights do not make equal networks: strides, dilations, the place of a stride, activations and
where prompts stand are in no tensor. So a checkpoint carries a summary of what the network returns
for a fixed small image, with fixed values in everything that trains. Settings would have to be
known one by one, and are written differently by every version of every library.
"""
from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mmprotune.lean.dry_run import image_shapes, noise, tensors_in, undisturbed

from . import calls
from .trace import BATCH, Trace

PROJECTIONS = 8
# Below this, what is computed differs by rounding alone.
ROUNDING = 1e-4
# Two summaries, without and with prompts.
PACKED_BYTES = 2 * 4 * (PROJECTIONS + 1)
_ROWS = 4093


def summary(outputs: Iterable[Tensor]) -> Tensor:
    """Projects what a network returns onto fixed directions.

    Args:
        outputs (Iterable[Tensor]): Its outputs, of any shapes.

    Returns:
        Tensor: float32 of shape (PROJECTIONS + 1, ): projections of the outputs, each scaled to one
        in the mean square, and the logarithm of their scale. A relative change of the outputs by
        ``d`` moves each by about ``d``.
    """
    generator = torch.Generator().manual_seed(0)
    total, scales = torch.zeros(PROJECTIONS), []
    for output in outputs:
        if not output.is_floating_point() or not output.numel():
            continue
        y = output.detach().float().cpu().flatten()
        scale = y.square().mean().sqrt().clamp_min(1e-30)
        rows = nn.functional.pad(y / scale, (0, -len(y) % _ROWS)).view(-1, _ROWS)
        left = torch.randn(PROJECTIONS, len(rows), generator=generator)
        right = torch.randn(_ROWS, PROJECTIONS, generator=generator)
        total += ((left @ rows) * right.t()).sum(1) / math.sqrt(len(y))
        scales.append(scale.log())
    count = max(1, len(scales))
    return torch.cat([total / math.sqrt(count), torch.tensor([float(sum(scales)) / count])])


def pack(summaries: Iterable[Tensor]) -> Tensor:
    """Several summaries as uint8, which no cast to another precision and no average changes."""
    return torch.cat(list(summaries)).view(torch.uint8)


def difference(first: Tensor, second: Tensor) -> list[float]:
    """How far packed summaries of the same kind are apart.

    Args:
        first, second (Tensor): What :func:`pack` returned.

    Returns:
        list[float]: The largest difference of each summary in them; 0 where one is unknown.
    """
    pairs = [t.cpu().contiguous().view(torch.float32).view(-1, PROJECTIONS + 1)
             for t in (first, second)]
    return [0. if not a.any() or not b.any() or not (a.isfinite() & b.isfinite()).all()
            else float((a - b).abs().max()) for a, b in zip(*pairs)]


@contextlib.contextmanager
def pinned(owner: nn.Module, frozen: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """While open, whatever is not frozen has fixed values that depend on its name and shape only.

    Args:
        owner (nn.Module): The prompted backbone.
        frozen (Mapping[str, Tensor], optional): Other values for frozen tensors, by dotted name in
            ``owner.backbone``. Defaults to None.
    """
    names = {f'backbone.{name}' for name in owner.frozen_names}
    tensors = {f'backbone.{name}': value for name, value in (frozen or {}).items()}
    before: list[tuple[Tensor, Tensor]] = []
    buffers = [(f'{path}.{name}' if path else name, buffer)
               for path, part in owner.named_modules() for name, buffer in part._buffers.items()
               if buffer is not None and name not in part._non_persistent_buffers_set]
    try:
        for name, tensor in (*owner.named_parameters(), *buffers):
            if name in names:
                value = tensors.get(name, tensor.data).to(tensor.device)
            elif not tensor.is_floating_point():
                continue
            elif isinstance(tensor, nn.Parameter):
                value = _fixed_values(name, tensor)
            else:  # statistics of a norm that trains
                value = torch.full_like(tensor, float(name.endswith('var')))
            before.append((tensor, tensor.data))
            tensor.data = value
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def function_of(owner: nn.Module, frozen: Mapping[str, Tensor] | None = None,
                trace: Trace | None = None, former: bool = False) -> Tensor:
    """Summarises what a prompted backbone returns for a small image, without prompts and with them,
    where everything that trains has fixed values.

    Args:
        owner (nn.Module): The prompted backbone.
        frozen (Mapping[str, Tensor], optional): Other values for the frozen tensors, by dotted
            name in ``owner.backbone``. Defaults to None.
        trace (Trace, optional): A dry run of ``owner.backbone`` with the values that it is to have
            here and without prompts, which saves one. Defaults to None.
        former (bool): Whether to take the image size that the backbone says it was built for, as
            older versions did. Defaults to False.

    Returns:
        Tensor: uint8 of shape (PACKED_BYTES, ); zeros where it runs at no usual image size.
    """
    dtypes = [p.dtype for p in owner.parameters() if p.is_floating_point()]
    # Weights that are stored in 16 bits compute in the precision of their input.
    dtype = torch.float32 if torch.float32 in dtypes else next(iter(dtypes), torch.float32)

    shapes = image_shapes(owner.backbone) if trace is None else [trace.shape]
    if former:
        size = getattr(owner.backbone, 'img_size', None)
        shapes = [] if size is None else [(3, *((size, size) if isinstance(size, int) else size))]

    def run(shape: tuple[int, int, int], plain: bool) -> Tensor:
        images = noise(owner.backbone, shape, BATCH)
        if plain and trace is not None and (shape, dtype) == (trace.shape, images.dtype):
            return summary(trace.outputs)
        torch.manual_seed(0)
        with calls.opened(owner, calls.Call(shape[1:], plain)):
            return summary(tensors_in(owner.backbone(images.to(dtype))))

    with pinned(owner, frozen), undisturbed(owner), torch.inference_mode(False), torch.no_grad():
        for shape in shapes:
            with contextlib.suppress(Exception):  # whatever it is: not at this size
                plain = run(shape, plain=True)
                return pack([plain, run(shape, plain=False) if owner.stages else plain])
    return torch.zeros(PACKED_BYTES, dtype=torch.uint8)


def _fixed_values(name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(like.shape, generator=generator)
    if like.dim() > 1:
        values = values / math.sqrt(max(1, like[0].numel()))
    else:
        values = values * 0.1 + float(name.rpartition('.')[2] in ('weight', 'gamma', 'scale'))
    return values.to(like.device, like.dtype)
