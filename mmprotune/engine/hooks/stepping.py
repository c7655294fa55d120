"""Looking at gradients just before an optimizer steps."""
from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# Once something is compiled, PyTorch 2.1 runs no more hooks of any optimizer. Of newer ones, 2.10
# is the oldest that was tried.
TORCH_LOSES_HOOKS = torch.__version__ < (2, 10)
_FUNCTIONS = '_mmprotune_before_step'


def before_step(optimizer: Optimizer,
                function: Callable[[Optimizer, tuple, dict], None]) -> RemovableHandle:
    """As ``optimizer.register_step_pre_hook``, and kept where PyTorch loses such hooks.

    Args:
        optimizer (Optimizer): The optimizer.
        function (Callable): Called with it, and the arguments of its ``step``; returns nothing.

    Returns:
        RemovableHandle: Its ``remove()`` ends that.
    """
    if not TORCH_LOSES_HOOKS:
        return optimizer.register_step_pre_hook(function)
    functions = vars(optimizer).get(_FUNCTIONS)
    if functions is None:
        functions = vars(optimizer)[_FUNCTIONS] = OrderedDict()
        step = optimizer.step

        @functools.wraps(step)
        def watched(optimizer, *args, **kwargs):
            for one in tuple(functions.values()):
                one(optimizer, args, kwargs)
            return step(*args, **kwargs)

        # A method, which schedulers that are made later take apart.
        optimizer.step = types.MethodType(watched, optimizer)
    handle = RemovableHandle(functions)
    functions[handle.id] = function
    return handle
