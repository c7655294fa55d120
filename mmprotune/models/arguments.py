"""What a backbone's ``forward`` is given besides images."""
from __future__ import annotations

import inspect
import typing
from functools import partial

from torch import nn
from torch.utils.hooks import RemovableHandle


def default_to_none(backbone: nn.Module) -> RemovableHandle | None:
    """Lets a backbone be called with images alone where it asks for more that may be None.

    mmpretrain's networks for masked image modelling want a mask, and None means that nothing is
    masked. What ``forward`` requires and does not declare ``Optional`` is still missing.

    Args:
        backbone (nn.Module): The backbone; gets a hook in front of its ``forward``.

    Returns:
        RemovableHandle, optional: Of the hook; None where there is nothing to fill in.
    """
    forward = type(backbone).forward
    try:
        hints = typing.get_type_hints(forward)
    except Exception:  # a name that only type checkers know
        hints = {}
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    places = {p.name: place for place, p in enumerate(parameters, start=1)
              if p.default is p.empty and type(None) in typing.get_args(hints.get(p.name))}
    if not places:
        return None
    return backbone.register_forward_pre_hook(partial(_filled, places), with_kwargs=True)


def _filled(places: dict[str, int], module: nn.Module, args: tuple,
            kwargs: dict) -> tuple[tuple, dict]:
    missing = {name: None for name, place in places.items()
               if place >= len(args) and name not in kwargs}
    return args, {**kwargs, **missing}
