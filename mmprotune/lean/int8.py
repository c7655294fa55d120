"""Frozen weights in 8 bits: integers from -127 to 127, and a scale for each output channel.

Plain tensors: the parameter ``weight`` becomes int8 and gets a buffer ``weight_scale`` beside it,
so that fingerprints, audits, checkpoints and trunks have them as any other frozen tensors. Layers
compute with the product of both.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .precision import converted

_SUFFIX = '_scale'
_LARGEST = 127


def scale_of(module: nn.Module, name: str = 'weight') -> Tensor | None:
    """The scale of a parameter.

    Args:
        module (nn.Module): Its owner.
        name (str): Its name. Defaults to 'weight'.

    Returns:
        Tensor, optional: It broadcasts against the parameter; None where that is not in 8 bits.
    """
    parameter = module._parameters.get(name)
    if parameter is None or parameter.dtype != torch.int8:
        return None
    return module._buffers[name + _SUFFIX]


def scale_in(buffers: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
    """As :func:`scale_of`, by dotted name in a module whose buffers by name are given."""
    return buffers[name + _SUFFIX] if parameter.dtype == torch.int8 else None


def scale_names(module: nn.Module) -> set[str]:
    """Dotted names of the scales in a network."""
    return {f'{path}.{name}{_SUFFIX}' if path else name + _SUFFIX
            for path, child in module.named_modules(remove_duplicate=False)
            for name in child._parameters if scale_of(child, name) is not None}


def quantize(module: nn.Module, name: str, shared: dict[int, Tensor]) -> bool:
    """Stores a parameter of two dimensions or more in 8 bits, in place.

    Args:
        module (nn.Module): Its owner, which is lean.
        name (str): Its name.
        shared (dict[int, Tensor]): Scales by the ``id`` of the parameter, of those that were stored
            before; several modules may have one parameter. Added to.

    Returns:
        bool: False where it stays as it is, as it holds values that are not finite.
    """
    parameter = module._parameters[name]
    if id(parameter) not in shared:
        if not parameter.isfinite().all():
            return False
        parameter.data, shared[id(parameter)] = _rounded(module, parameter.data)
    module.register_buffer(name + _SUFFIX, shared[id(parameter)])
    module._register_load_state_dict_pre_hook(_round_incoming, with_module=True)
    return True


def dequantize(module: nn.Module) -> None:
    """Stores the module's own parameters in floating point again, in place."""
    for name, parameter in module._parameters.items():
        scale = scale_of(module, name)
        if scale is not None:
            parameter.data = converted(parameter.data, scale.dtype, scale)
    for name in module._parameters:
        module._buffers.pop(name + _SUFFIX, None)


def _rounded(module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    channels = 1 if getattr(module, 'transposed', False) else 0
    weight = weight.detach().float()
    largest = weight.abs().amax([d for d in range(weight.dim()) if d != channels], keepdim=True)
    scale = (largest / _LARGEST).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().to(torch.int8), scale


def _round_incoming(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Load hook: weights that come in floating point."""
    for name, parameter in module._parameters.items():
        incoming = state_dict.get(prefix + name)
        if (scale_of(module, name) is not None and isinstance(incoming, Tensor)
                and incoming.is_floating_point() and incoming.shape == parameter.shape):
            state_dict[prefix + name], state_dict[prefix + name + _SUFFIX] = _rounded(
                module, incoming)
