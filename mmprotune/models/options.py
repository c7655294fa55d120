"""Which values the options of a prompted backbone may have."""
from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mmprotune.errors import OptionError, OptionTypeError
from mmprotune.lean.convert import STORAGE_DTYPES
from mmprotune.lean.options import LeanOptions

from .insertion import INSERT


def check_arguments(backbone, prompt, freeze, trainable, last_stage, backbone_dtype, lean, insert,
                    stem, drop_path) -> None:
    """Raises TypeError or ValueError, naming the key; arguments as those of
    :class:`~mmprotune.PromptedBackbone`."""
    for key, value, choices in (('freeze', freeze, ('pretrained', 'all')),
                                ('last_stage', last_stage, ('residual', 'serial', 'none')),
                                ('insert', insert, tuple(INSERT)),
                                ('backbone_dtype', backbone_dtype, (None, *STORAGE_DTYPES))):
        if value not in choices:
            raise OptionError(f'{key} must be one of {choices}, got {value!r}')
    if insert not in ('stages', 'auto') and last_stage != 'residual':
        raise OptionError(f'last_stage={last_stage!r} is for prompts at stage ends, got '
                          f'insert={insert!r}')
    if LeanOptions.parse(lean) is None and backbone_dtype is not None:
        raise OptionError(f'backbone_dtype={backbone_dtype!r} needs lean layers, but lean=False')
    if not isinstance(stem, bool):
        raise OptionTypeError(f'stem must be True or False, got {stem!r}')
    if not isinstance(drop_path, bool):
        raise OptionTypeError(f"drop_path must be True or False (the rate is the backbone's own "
                              f'key drop_path_rate), got {drop_path!r}')
    if isinstance(trainable, str) or not isinstance(trainable, Iterable) or not all(
            isinstance(t, str) for t in trainable):
        raise OptionTypeError(f'trainable must be a list of regular expressions, got {trainable!r}')
    if prompt is not None and (not isinstance(prompt, dict) or 'type' not in prompt):
        raise OptionTypeError(f'prompt must be None or a dict with the key "type", got {prompt!r}')
    if not isinstance(backbone, nn.Module) and (
            not isinstance(backbone, dict) or 'type' not in backbone):
        raise OptionTypeError('backbone must be a dict with the key "type", or an nn.Module, '
                              f'got {backbone!r}')
