"""Running a prompted backbone as ``torch.compile`` compiles it."""
from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmprotune.errors import MMProtuneError, OptionError, OptionTypeError
from mmprotune.lean.graph import is_recorded

from . import calls

# Options that are torch.compile's own, and the partitioner's share of memory.
_OPTIONS = ('backend', 'mode', 'options', 'dynamic', 'fullgraph', 'activation_memory_budget')


def check_compile(value: bool | Mapping) -> None:
    """Refuses wrong values of the key ``compile``.

    Args:
        value (bool | Mapping): See :class:`~mmprotune.PromptedBackbone`.

    Raises:
        TypeError, ValueError: It is not valid; the message names the key.
    """
    if isinstance(value, bool):
        return
    if not isinstance(value, Mapping):
        raise OptionTypeError(f'compile must be True, False or a dict, got {value!r}')
    unknown = sorted(map(str, set(value) - set(_OPTIONS)))
    if unknown:
        raise OptionError(f'compile has no option {unknown[0]!r}: expected {", ".join(_OPTIONS)}')
    for name, kinds, expected in (
            ('dynamic', (bool, type(None)), 'True, False or None'),
            ('fullgraph', bool, 'True or False'),
            ('mode', (str, type(None)), 'the name of a mode of torch.compile, or None'),
            ('options', (Mapping, type(None)), 'a dict of options of the backend, or None')):
        if name in value and not isinstance(value[name], kinds):
            raise OptionTypeError(f'compile.{name} must be {expected}, got {value[name]!r}')
    backend = value.get('backend', 'inductor')
    if not isinstance(backend, str) and not callable(backend):
        raise OptionTypeError(f'compile.backend must be the name of a backend of torch.compile, or '
                              f'a callable, got {backend!r}')
    if value.get('mode') is not None and value.get('options') is not None:
        raise OptionError(f'compile.mode={value["mode"]!r} and compile.options exclude each other')
    budget = value.get('activation_memory_budget', 1)
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise OptionTypeError(f'compile.activation_memory_budget must be a number, got {budget!r}')
    if not 0 <= budget <= 1:
        raise OptionError('compile.activation_memory_budget is a share of what would be kept: '
                          f'expected 0 to 1, got {budget}')
    if budget != 1 and _partitioner(activation_memory_budget=1.) is None:
        raise OptionError(f'compile.activation_memory_budget={budget} needs a newer PyTorch than '
                          f'{torch.__version__}, which has no such setting')
    given = {name: value[name] for name in ('backend', 'mode', 'options')
             if value.get(name) is not None}
    if given:
        try:
            torch.compile(_network, **given)  # looks at these, and compiles nothing yet
        except Exception as error:
            keys = ', '.join(f'compile.{name}={v!r}' for name, v in given.items())
            raise OptionError(
                f'{keys}: torch.compile refuses that: {_first_lines(error)}') from error


class _NoCompiler(MMProtuneError):
    """There is no ``torch.compile`` here."""


class Compiled:
    """Runs the network of a prompted backbone, compiled when it is first run.

    One object belongs to one backbone. Copies and pickles of it compile anew.

    Args:
        options (bool | Mapping): See ``compile`` of :class:`~mmprotune.PromptedBackbone`.

    Attributes:
        failed (bool): Whether it could not be compiled, so that it runs as it is.
    """

    def __init__(self, options: bool | Mapping) -> None:
        self.options = {} if options is True else dict(options)
        self._run: Callable | None = None
        self._said = self.failed = False

    def __reduce__(self):
        return type(self), (self.options, )

    def __call__(self, owner: nn.Module, x: Tensor, *args, **kwargs):
        """Runs the network once.

        Args:
            owner (nn.Module): The prompted backbone, one of whose calls is open.
            x (Tensor): Images of shape (N, C, H, W).
            *args, **kwargs: Handed on to the network.

        Returns:
            What the network returns.
        """
        if self.failed or not self._suits(owner):
            return owner.backbone(x, *args, **kwargs)
        from torch._dynamo import exc  # takes a second, and only who compiles needs it
        limit = getattr(exc, 'FailOnRecompileLimitHit', exc.TorchDynamoException)
        try:
            if self._run is None:
                _plain_numbers(owner.backbone)
                self._run = self._compile()
            # What goes wrong in the backward pass's half shall do so here, too.
            with _partitioner(
                    activation_memory_budget=self.options.get('activation_memory_budget'),
                    force_non_lazy_backward_lowering=True) or contextlib.nullcontext():
                return self._run(owner, x, args, kwargs)
        except (exc.TorchDynamoException, limit, _NoCompiler) as error:
            # If the network is wrong, this says so as it does when it is not compiled.
            outputs = owner.backbone(x, *args, **kwargs)
            self._give_up(owner, x, error)
            return outputs

    @staticmethod
    def _suits(owner: nn.Module) -> bool:
        """Not a call without prompts, or whose prompts somebody looks at, nor one that a compiler
        or tracer records already."""
        call = calls.current(owner)
        return not (call.plain or call.note is not None or is_recorded())

    def _compile(self) -> Callable:
        options = {k: v for k, v in self.options.items() if k != 'activation_memory_budget'}
        options.setdefault('fullgraph', True)
        if options.get('backend', 'inductor') == 'inductor' and options.get('mode') is None:
            from torch._inductor import config
            if hasattr(config, 'layout_optimization'):
                # Else the backward pass would get its frozen weights as copies, channels last,
                # which are kept until then: 43 MiB of a ResNet-50.
                options['options'] = {
                    'layout_optimization': False, **(options.get('options') or {})}
        if 'isolate_recompiles' in inspect.signature(torch.compile).parameters:
            options['isolate_recompiles'] = True  # of other backbones
        try:
            return torch.compile(_network, **options)
        except RuntimeError as error:  # not on this platform
            raise _NoCompiler(str(error)) from error

    def _give_up(self, owner: nn.Module, x: Tensor, error: Exception) -> None:
        name = type(owner.backbone).__name__
        reason = _first_lines(error)
        # A size too many says nothing against those that are compiled.
        if 'LimitHit' in type(error).__name__:
            if not self._said:
                self._said = True
                print_log(f'compile: {name} would be compiled once more for images of '
                          f'{tuple(x.shape)}, so these and others like them run as without '
                          f'compile ({reason})', logger='current', level=logging.WARNING)
            return
        self.failed, self._run = True, None
        print_log(f'compile: {name} cannot be compiled, so it runs as without compile ({reason})',
                  logger='current', level=logging.WARNING)


def _plain_numbers(network: nn.Module) -> None:
    """Turns NumPy's numbers on modules into Python's. The compiler takes them for tensors and does
    not branch by them (mmpretrain draws its drop path's rates with ``np.linspace``)."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, np.generic):
                setattr(module, name, value.item())


def _first_lines(error: Exception) -> str:
    """Which backend failed, and how: what the compiler says in its first two lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {" ".join(lines[:2])}'


def _network(owner: nn.Module, x: Tensor, args: tuple, kwargs: dict):
    # A call of its own, in which the size of the images is the compiler's symbol.
    with calls.opened(owner, calls.Call(tuple(x.shape[-2:]))):
        return owner.backbone(x, *args, **kwargs)


def _partitioner(**settings) -> contextlib.AbstractContextManager | None:
    """Settings of AOTAutograd that this PyTorch has, as a context; None where it has none of them.

    Args:
        **settings: Values by name; None means the one that is set.
    """
    from torch._functorch import config
    known = {k: v for k, v in settings.items() if v is not None and hasattr(config, k)}
    return config.patch(known) if known else None
