"""Faster ways to the same results on a CPU, for layers that build no graph."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .graph import is_autocast, is_recorded, run_folded

# Fewer multiplications than this take less time than it takes to call oneDNN.
LEAST_PRODUCT = 2**20


def _is_watched() -> bool:
    """Whether somebody looks at the operators: a tracer, or a mode such as PyTorch's counter of
    operations, which does not know oneDNN's."""
    return is_recorded() or torch._C._len_torch_dispatch_stack() > 0


def suits_pointwise(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`pointwise` computes the product of this map and weight.

    Args:
        x (Tensor): Map of shape (N, C, H, W).
        weight (Tensor): Weight of a 1x1 convolution with stride 1, without padding and groups.
    """
    return (not _is_watched() and x.device.type == 'cpu' and x.dim() == 4
            and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
            and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
            and torch.backends.mkldnn.is_available() and not is_autocast('cpu'))


def pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution by oneDNN. PyTorch takes it on several threads only; on one it multiplies
    matrices, which is slower.

    Args:
        x (Tensor): Map of shape (N, C, H, W); see :func:`suits_pointwise`.
        matrix (Tensor): Weight of shape (D, C).
        bias (Tensor, optional): Of shape (D, ). Defaults to None.

    Returns:
        Tensor: Map of shape (N, D, H, W), in the memory format of ``x``.
    """
    weight = matrix.contiguous()[..., None, None]
    return torch.mkldnn_convolution(x, weight, bias, [0, 0], [1, 1], [1, 1], 1)


def suits_product(x: Tensor, matrix: Tensor) -> bool:
    r"""Whether :func:`product` computes the product of these.

    Args:
        x (Tensor): Of shape (\*, C).
        matrix (Tensor): Of shape (D, C).
    """
    return (x.numel() * matrix.size(0) >= LEAST_PRODUCT and not _is_watched()
            and x.device.type == 'cpu' and x.dtype == matrix.dtype == torch.float32
            and torch.backends.mkldnn.is_available() and not is_autocast('cpu')
            and hasattr(torch.ops.mkldnn, '_linear_pointwise'))


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``F.linear`` by oneDNN. PyTorch takes MKL, which does not use every CPU's widest vectors.

    Args:
        x (Tensor): Of shape (\*, C); see :func:`suits_product`.
        matrix (Tensor): Of shape (D, C).
        bias (Tensor, optional): Of shape (D, ). Defaults to None.

    Returns:
        Tensor: Of shape (\*, D), contiguous.
    """
    y = torch.ops.mkldnn._linear_pointwise(
        x.reshape(-1, x.size(-1)), matrix, bias, 'none', [], '')
    return y.view(*x.shape[:-1], -1)


# --- the memory format of a whole network -----------------------------------------------------


def run_channels_last(network: nn.Module, x: Tensor, *args, **kwargs):
    """Runs a network with its norms folded, and with its maps channels-last, as oneDNN likes them,
    where nothing needs a graph and the network is known to give the same results
    (``lean_channels_last``).

    In a graph it would not pay: what reads the outputs would keep copies of them.

    Args:
        network (nn.Module): The network.
        x (Tensor): Images of shape (N, C, H, W).
        *args, **kwargs: Handed on to the network.

    Returns:
        What the network returns; maps are contiguous if the images are.
    """
    suits = (getattr(network, 'lean_channels_last', False) and not _is_watched()
             and x.device.type == 'cpu' and x.dim() == 4 and x.dtype == torch.float32
             and x.is_contiguous() and x.numel() > 0
             and torch.backends.mkldnn.is_available() and not is_autocast('cpu'))
    if not suits:
        return run_folded(network, x, *args, **kwargs)
    x = x.contiguous(memory_format=torch.channels_last)
    return _contiguous(run_folded(network, x, *args, **kwargs))


def _contiguous(output):
    if isinstance(output, Tensor):
        return _contiguous_map(output) if output.dim() == 4 else output
    if isinstance(output, Mapping):
        return type(output)((key, _contiguous(value)) for key, value in output.items())
    if isinstance(output, (tuple, list)):
        items = [_contiguous(item) for item in output]
        return type(output)(*items) if hasattr(output, '_fields') else type(output)(items)
    return output


def _contiguous_map(x: Tensor) -> Tensor:
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.contiguous()
    # A copy of one matrix goes block by block; of all maps at once it would stride through them.
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    for source, target in zip(x.permute(0, 2, 3, 1), result):
        target.flatten(1).copy_(source.flatten(0, 1).t())
    return result


# --- max pooling ------------------------------------------------------------------------------


def suits_separate_pool(x: Tensor, kernel, stride, padding, dilation, ceil_mode: bool) -> bool:
    """Whether :func:`separate_max_pool2d` computes this max pooling."""
    return (not _is_watched() and x.device.type == 'cpu' and x.is_floating_point()
            and x.dim() in (3, 4)
            and x.numel() > 0 and not ceil_mode and dilation == (1, 1) and min(stride) > 0
            and all(0 <= 2 * p < k <= n + 2 * p for k, p, n in zip(kernel, padding, x.shape[-2:])))


def separate_max_pool2d(x: Tensor, kernel, stride, padding) -> Tensor:
    """Max pooling along one dimension after the other, by whole rows: the same numbers as PyTorch's
    kernel, which goes window by window and notes where each maximum is.

    Args:
        x (Tensor): Input of shape (N, C, H, W) or (C, H, W); see :func:`suits_separate_pool`.
        kernel, stride, padding (tuple[int, int]): Of rows and columns.
    """
    for dim in (-1, -2):
        x = _max_along(x, dim, kernel[dim], stride[dim], padding[dim])
    return x


def _max_along(x: Tensor, dim: int, kernel: int, stride: int, padding: int) -> Tensor:
    length = x.size(dim)
    count = (length + 2 * padding - kernel) // stride + 1
    # The place that starts on the first element has one in every window.
    result = None
    for place in sorted(range(kernel), key=lambda place: place != padding):
        first = max(0, -(-(padding - place) // stride))
        last = min(count - 1, (length - 1 + padding - place) // stride)
        if last < first:  # beyond the edge in every window
            continue
        start = first * stride + place - padding
        part = x.narrow(dim, start, (last - first) * stride + 1)
        part = part[(..., slice(None, None, stride), *[slice(None)] * (-1 - dim))]
        if result is None:
            result = part.clone()
        else:
            target = result.narrow(dim, first, last - first + 1)
            torch.maximum(target, part, out=target)
    return result
