"""The backbone classes that the hosts register, each in its smallest architecture."""
from __future__ import annotations

import importlib
import inspect

from . import LIBRARIES

# Classes that live beside the backbones without being one.
NOT_A_BACKBONE = {
    'mmseg.InterpConv': 'an up-sampling layer of UNet',
    'mmseg.DeconvModule': 'an up-sampling layer of UNet',
}
# Arguments that have no default and no list of architectures to take the smallest from.
_RESNET18 = dict(type='mmseg.ResNetV1c', depth=18, in_channels=3, num_stages=4,
                 out_indices=(0, 1, 2, 3), dilations=(1, 1, 1, 1), strides=(1, 2, 2, 2),
                 norm_cfg=dict(type='BN'))
_STDC = dict(stdc_type='STDCNet1', in_channels=3, channels=(32, 64, 256, 512, 1024),
             bottleneck_type='cat', num_convs=4, norm_cfg=dict(type='BN'),
             act_cfg=dict(type='ReLU'))
ARGUMENTS = {
    'mmdet.TridentResNet': dict(depth=50, num_branch=3, test_branch_idx=1, num_stages=3,
                                strides=(1, 2, 2), dilations=(1, 1, 1),
                                trident_dilations=(1, 2, 3), out_indices=(2, )),
    'mmdet.SSDVGG': dict(depth=16, with_last_pool=False, ceil_mode=True),
    'mmseg.STDCNet': _STDC,
    'mmseg.STDCContextPathNet': dict(
        backbone_cfg=dict(type='mmseg.STDCNet', **_STDC),
        ffm_cfg=dict(in_channels=384, out_channels=256, scale_factor=4)),
    'mmseg.BiSeNetV1': dict(backbone_cfg=_RESNET18, spatial_channels=(64, 64, 64, 128),
                            context_channels=(128, 256, 512)),
    'mmseg.ICNet': dict(backbone_cfg=_RESNET18, in_channels=3, layer_channels=(128, 512),
                        light_branch_middle_channels=32, psp_out_channels=512),
    'mmseg.TIMMBackbone': dict(model_name='resnet18', features_only=True, pretrained=False),
    'mmpretrain.TIMMBackbone': dict(model_name='vit_tiny_patch16_224', pretrained=False),
}


def arguments(name: str, cls: type) -> dict:
    """Arguments of the smallest architecture.

    Args:
        name (str): ``library.Class``.
        cls (type): The class.

    Returns:
        dict: Keyword arguments.
    """
    if name in ARGUMENTS:
        return dict(ARGUMENTS[name])
    parameters = {}
    for base in cls.__mro__:
        own = inspect.signature(base.__init__).parameters
        parameters = {**own, **parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break  # else it hands the rest on to the next class
    kwargs = {}
    for attribute in ('arch_zoo', 'arch_settings'):
        zoo = getattr(cls, attribute, None)
        if isinstance(zoo, dict) and 'arch' in parameters:
            kwargs['arch'] = min(zoo, key=lambda arch: _weight(zoo[arch]))
            break
        if isinstance(zoo, dict) and 'depth' in parameters:
            kwargs['depth'] = min(zoo)
    if 'extra' in parameters and parameters['extra'].default is inspect.Parameter.empty:
        # The same network in mmpretrain knows its architectures by name.
        keys = ('num_modules', 'num_branches', 'block', 'num_blocks', 'num_channels')
        stages = importlib.import_module('mmpretrain.models').HRNet.arch_zoo['w18']
        kwargs['extra'] = {f'stage{i}': dict(zip(keys, s)) for i, s in enumerate(stages, start=1)}
    return kwargs


def _weight(architecture) -> float:
    """A number that grows with an architecture: the sum of the numbers that describe it."""
    if isinstance(architecture, dict):
        return sum(_weight(v) for v in architecture.values())
    if isinstance(architecture, (list, tuple)):
        return sum(map(_weight, architecture))
    if isinstance(architecture, bool) or not isinstance(architecture, (int, float)):
        return 0
    return architecture


def backbones() -> dict[str, type]:
    """Every registered backbone class by ``library.Class``."""
    found = {}
    for library in LIBRARIES:
        importlib.import_module(f'{library}.models')
        registry = importlib.import_module(f'{library}.registry').MODELS
        for name, cls in sorted(registry.module_dict.items()):
            full = f'{library}.{name}'
            if '.backbones.' in cls.__module__ and full not in NOT_A_BACKBONE:
                found[full] = cls
    return found
