"""Products of matrices by oneDNN, which on a CPU are faster than what PyTorch takes.

Operators that a build of PyTorch lacks are None here, and then everything is PyTorch's.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .graph import is_recorded
from .precision import is_autocast

# Fewer multiplications than this take less time than it takes to call oneDNN.
LEAST_PRODUCT = 2**20
_linear = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
_count_modes = getattr(torch._C, '_len_torch_dispatch_stack', None)


def _suits(*tensors: Tensor) -> bool:
    """Whether oneDNN may compute with these. Not where somebody looks at the operators: a tracer,
    or a mode such as PyTorch's counter of operations, which does not know oneDNN's."""
    return (all(t.device.type == 'cpu' and t.dtype == torch.float32 for t in tensors)
            and not is_recorded() and _count_modes is not None and not _count_modes()
            and torch.backends.mkldnn.is_available() and not is_autocast('cpu'))


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor | None:
    r"""``F.linear``. PyTorch takes MKL, which does not use every CPU's widest vectors.

    Args:
        x (Tensor): Of shape (\*, C).
        matrix (Tensor): Of shape (D, C).
        bias (Tensor, optional): Of shape (D, ). Defaults to None.

    Returns:
        Tensor, optional: Of shape (\*, D), contiguous; None where oneDNN does not suit.
    """
    if _linear is None or x.numel() * matrix.size(0) < LEAST_PRODUCT or not _suits(x, matrix):
        return None
    y = _linear(x.reshape(-1, x.size(-1)), matrix, bias, 'none', [], '')
    return y.view(*x.shape[:-1], -1)
