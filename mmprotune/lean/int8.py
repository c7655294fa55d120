"""Frozen weights in 8 bits: integers from -127 to 127, and a scale for each output channel.

Plain tensors: the parameter ``weight`` becomes a buffer of that name, int8, with ``weight_scale``
beside it, so that fingerprints, audits, checkpoints and trunks have them as any other frozen
tensors. No parameters, as hosts take means of those. Layers compute with the product of both.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .precision import converted

_SUFFIX = '_scale'
_LARGEST = 127


def scale_of(module: nn.Module, name: str = 'weight') -> Tensor | None:
    """The scale of a weight.

    Args:
        module (nn.Module): Its owner.
        name (str): Its name. Defaults to 'weight'.

    Returns:
        Tensor, optional: It broadcasts against the weight; None where that is not in 8 bits.
    """
    weight = module._buffers.get(name)
    if weight is None or weight.dtype != torch.int8:
        return None
    return module._buffers.get(name + _SUFFIX)


def weights_in(module: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights in 8 bits in a network, with their scales, by dotted name.

    Args:
        module (nn.Module): The network.
    """
    return {f'{path}.{name}' if path else name: (weight, scale_of(child, name))
            for path, child in module.named_modules(remove_duplicate=False)
            for name, weight in child._buffers.items() if scale_of(child, name) is not None}


def scale_names(module: nn.Module) -> set[str]:
    """Dotted names of the scales in a network."""
    return {name + _SUFFIX for name in weights_in(module)}


def quantize(module: nn.Module, name: str, shared: dict[nn.Parameter, tuple]) -> bool:
    """Stores a parameter of two dimensions or more in 8 bits, in place.

    Args:
        module (nn.Module): Its owner, which is lean.
        name (str): Its name.
        shared (dict[nn.Parameter, tuple]): What parameters became that were stored before; several
            modules may have one. Added to.

    Returns:
        bool: False where it stays as it is, as it holds values that are not finite.
    """
    parameter = module._parameters[name]
    if parameter not in shared:
        if not parameter.isfinite().all():
            return False
        shared[parameter] = _rounded(module, parameter)
    del module._parameters[name]
    for suffix, tensor in zip(('', _SUFFIX), shared[parameter]):
        module.register_buffer(name + suffix, tensor)
    module._register_load_state_dict_pre_hook(_round_incoming, with_module=True)
    return True


def dequantize(module: nn.Module) -> None:
    """Stores the weights of a network that are in 8 bits in floating point again, in place.

    Args:
        module (nn.Module): The network.
    """
    made: dict[Tensor, nn.Parameter] = {}  # what modules share stays shared
    for child in module.modules():
        for name, weight in list(child._buffers.items()):
            scale = scale_of(child, name)
            if scale is not None:
                if weight not in made:
                    made[weight] = nn.Parameter(
                        converted(weight, scale.dtype, scale), requires_grad=False)
                del child._buffers[name], child._buffers[name + _SUFFIX]
                child.register_parameter(name, made[weight])


def _rounded(module: nn.Module, weight: Tensor) -> tuple[Tensor, Tensor]:
    channels = 1 if getattr(module, 'transposed', False) else 0
    weight = weight.detach().float()
    largest = weight.abs().amax([d for d in range(weight.dim()) if d != channels], keepdim=True)
    scale = (largest / _LARGEST).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round().to(torch.int8), scale


def _round_incoming(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Load hook: weights that come in floating point."""
    for name, weight in module._buffers.items():
        incoming = state_dict.get(prefix + name)
        if (scale_of(module, name) is not None and isinstance(incoming, Tensor)
                and incoming.is_floating_point() and incoming.shape == weight.shape):
            state_dict[prefix + name], state_dict[prefix + name + _SUFFIX] = _rounded(
                module, incoming)
