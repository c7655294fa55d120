"""SHA-256 over tensors: the identity of a frozen backbone."""
from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

# Counters that newer PyTorch versions added to BatchNorm; older files do not hold them.
OPTIONAL_BUFFERS = ('num_batches_tracked', )


def identity(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What makes a backbone the same one: all but counters that nothing frozen reads.

    Args:
        tensors (Mapping[str, Tensor]): Its frozen tensors by name.
    """
    return {n: t for n, t in tensors.items() if n.rpartition('.')[2] not in OPTIONAL_BUFFERS}


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach().cpu().contiguous()
    # A view as bytes works for every dtype, bfloat16 included, which NumPy does not know.
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _update(sha: hashlib._Hash, name: str, tensor: Tensor) -> None:
    sha.update(f'{name}|{tensor.dtype}|{tuple(tensor.shape)}|'.encode())
    if tensor.numel():
        sha.update(_bytes(tensor))


def digest_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor: its name, dtype, shape and bytes.

    Args:
        tensors (Mapping[str, Tensor]): Tensors by name, on any device.

    Returns:
        dict[str, str]: Hexadecimal digest by name.
    """
    digests = {}
    for name, tensor in tensors.items():
        sha = hashlib.sha256()
        _update(sha, name, tensor)
        digests[name] = sha.hexdigest()
    return digests


def fingerprint(tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of all tensors together, independent of their order and device.

    Args:
        tensors (Mapping[str, Tensor]): Tensors by name.

    Returns:
        Tensor: uint8 tensor of shape (32, ), on the CPU.
    """
    sha = hashlib.sha256()
    for name in sorted(tensors):
        _update(sha, name, tensors[name])
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)
