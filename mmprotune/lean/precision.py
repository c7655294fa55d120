"""In which precision lean functions compute: autocast, and weights stored in a lower one."""
from __future__ import annotations

import contextlib

import torch
from torch import Tensor

_AS_IT_IS = contextlib.nullcontext()


class Precision:
    """The autocast state of a forward pass, to compute something again in the same dtypes.

    Args:
        device (torch.device): Device of the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device_type = device.type
        self.enabled, self.dtype = _autocast_state(device.type)

    def __call__(self) -> contextlib.AbstractContextManager:
        return _autocast(self.device_type, self.enabled, self.dtype)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off on the device of ``x``: gradients keep the dtypes they come in."""
    return _autocast(x.device.type, False, None)


def is_autocast(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    return _autocast_state(device_type)[0]


def _autocast(device_type: str, enabled: bool, dtype: torch.dtype | None):
    if not enabled and not is_autocast(device_type):
        return _AS_IT_IS
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


def _autocast_state(device_type: str) -> tuple[bool, torch.dtype | None]:
    try:
        enabled = torch.is_autocast_enabled(device_type)
        return enabled, torch.get_autocast_dtype(device_type) if enabled else None
    except (TypeError, AttributeError):  # torch < 2.4: one function a device
        if device_type == 'cpu':
            return torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
        return torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()


def cast(weight: Tensor | None, x: Tensor, scale: Tensor | None = None) -> Tensor | None:
    """A weight that is stored in a lower precision than ``x``, in the dtype of ``x``.

    Under autocast, and in every other case, the weight itself; one in 8 bits in floating point.

    Args:
        weight (Tensor, optional): A frozen parameter.
        x (Tensor): What it is applied to.
        scale (Tensor, optional): Of a weight in 8 bits. Defaults to None.
    """
    if weight is None or scale is None and weight.element_size() >= x.element_size():
        return weight
    if is_autocast(x.device.type):
        return weight if scale is None else converted(weight, scale.dtype, scale)
    return converted(weight, x.dtype, scale)


def converted(weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """A stored weight in another precision.

    Args:
        weight (Tensor): As it is stored.
        dtype (torch.dtype): Of what is returned.
        scale (Tensor, optional): Of a weight in 8 bits; both are multiplied in its precision.
            Defaults to None.
    """
    if scale is not None:
        weight = weight.to(scale.dtype) * scale
    return weight.to(dtype)
