"""Putting prompts into a backbone, and adding them to its features."""
from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmprotune.errors import OptionError
from mmprotune.lean.prompts import add_prompt, prompt_of
from mmprotune.registry import MODELS

from . import calls
from .identity import pinned
from .insertion import Stage, Tap, find_places
from .layout import as_map
from .trace import Trace

_ATTACHING = threading.Lock()


def add_prompts(owner: nn.Module, prompt: dict, stages: str | Sequence[str], stem: bool) -> Trace:
    """Builds a block for every place, and hooks it behind the module whose output is the feature
    there.

    Args:
        owner (nn.Module): The prompted backbone; gets ``prompts`` and ``stages``.
        prompt (dict): Config of the block.
        stages, stem: See :func:`~mmprotune.models.insertion.find_places`.

    Returns:
        Trace: The dry run that found the places.

    Raises:
        StageError, TypeError, ValueError: As there; or ``last_stage`` does not fit.
    """
    with pinned(owner):  # so that what it computes counts for frozen_function too
        found, remarks, trace = find_places(owner.backbone, stages, owner.insert, stem)
    for remark in remarks:
        print_log(remark, logger='current', level=logging.WARNING)
    last = found[-1].path
    if owner.last_stage != 'residual' and not found[-1].name.startswith('stage'):
        raise OptionError(f'last_stage={owner.last_stage!r} is for prompts at stage ends, got '
                          f"insert={owner.insert!r}, which is 'narrow' here")
    if owner.last_stage == 'serial' and remarks.is_last_unread:
        raise OptionError("last_stage='serial' passes on the last prompt alone, but no output "
                          f'of {type(owner.backbone).__name__} depends on it ({remarks[-1]}); '
                          'let the backbone return feature maps (backbone.out_type, say), or '
                          "use last_stage='residual'")
    if owner.last_stage == 'none' and not remarks.is_last_unread:
        found = [stage for stage in found if stage.path != last]
    for stage in found:
        cfg = dict(prompt, channels=stage.channels)
        serial = owner.last_stage == 'serial' and stage.path == last
        if serial:
            if cfg.get('zero_init') or cfg.get('scale') == 0:
                raise OptionError("last_stage='serial' passes on the last prompt alone: "
                                  'prompt.zero_init=True or prompt.scale=0 would kill the '
                                  'features; leave both unset')
            cfg['zero_init'] = False
        block = MODELS.build(cfg)
        if serial and not getattr(block, 'stands_alone', True):
            raise OptionError("last_stage='serial' passes on the last prompt alone, but that of "
                              f'{type(block).__name__} is only a change of the feature; use '
                              "last_stage='residual' or another prompt.type")
        owner.prompts[stage.name] = block
        owner.stages.append(stage)
    if not owner.stages:
        raise OptionError(f'no prompt is left: {last} is the only stage and '
                          f'last_stage={owner.last_stage!r}; prompt=None is the way to have none')
    attach_prompts(owner)
    return trace


def attach_prompts(owner: nn.Module) -> None:
    """Hooks prompts behind the modules of their places, where they are not yet.

    What fuses convolutions with norms, or converts norms, puts other modules in their place, which
    have no hooks.

    Args:
        owner (nn.Module): The prompted backbone.
    """
    for stage in reversed(owner.stages):  # each goes before those that are there
        module = owner.backbone.get_submodule(stage.path)
        if not _has_tap(owner, stage, module):
            with _ATTACHING:
                # Whoever wraps the module keeps its hooks inside.
                if not any(_has_tap(owner, stage, inner) for inner in module.modules()):
                    # Before the backbone's own hooks, which may take features from here.
                    owner._handles.append(module.register_forward_hook(
                        Tap(owner, stage), prepend=True, with_kwargs=True))


def _has_tap(owner: nn.Module, stage: Stage, module: nn.Module) -> bool:
    return any(isinstance(hook, Tap) and hook.owner is owner and hook.stage == stage
               for hook in module._forward_hooks.values())


def apply_prompt(owner: nn.Module, stage: Stage, x: Tensor, args: tuple,
                 kwargs: dict | None) -> Tensor:
    """See :meth:`mmprotune.PromptedBackbone.apply_prompt`."""
    if calls.is_plain(owner):
        return x
    call = calls.current(owner)
    channels = x.size(1 if stage.layout.kind == 'NCHW' else -1)
    if channels != stage.channels:
        raise OptionError(
            f'{type(owner.backbone).__name__}.{stage.path}: its feature had {stage.channels} '
            f'channels when the stages were found and has {channels} in this call, which makes '
            'another way through the backbone (given a mask, say); name modules that return '
            'the same in both with model.backbone.stages=[…]')
    to_map, from_map = as_map(stage.layout, x, (*args, *(kwargs or {}).values()),
                              partial(calls.grid_of, owner, stage, x))
    block, note = owner.prompts[stage.name], None
    if call is not None and call.note is not None:
        note = partial(call.note, stage.name)
    serial = owner.last_stage == 'serial' and stage.path == owner.stages[-1].path
    if not serial:
        return add_prompt(block, x, to_map, from_map, note)
    feature = to_map(x)
    prompt = prompt_of(block, feature)
    if note is not None:
        note(prompt, feature)
    prompt = from_map(prompt)
    extra = stage.layout.extra_tokens  # which have no prompt to be replaced by
    return torch.cat((x[:, :extra], prompt[:, extra:]), dim=1) if extra else prompt
