"""Layers that several prompted backbones have in common run once for an image.

A layer's output is used again by another backbone where the layers are the same, see
:mod:`~mmprotune.models.sharing`, and get equal inputs, down to the last bit. So it does not matter
why inputs are equal: prompts that have not been reached yet and prompts on the outputs alike let
everything before them be shared.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from mmprotune.lean.dry_run import tensors_in

from .sharing import Shared, running, same_value


def _copied(value, tensor: Callable[[Tensor], Tensor]):
    """A structure with new containers, and with each tensor as ``tensor`` returns it."""
    if isinstance(value, Tensor):
        return tensor(value)
    if type(value) in (list, tuple):
        return type(value)(_copied(item, tensor) for item in value)
    if type(value) is dict:
        return {key: _copied(item, tensor) for key, item in value.items()}
    if isinstance(value, (int, float, str, type(None))):
        return value
    raise TypeError(f'{type(value).__name__} cannot be shared')


def _clones() -> Callable[[Tensor], Tensor]:
    made: dict[int, Tensor] = {}
    return lambda tensor: made.setdefault(id(tensor), tensor.clone())


def _versions(*values) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors_in(values)]


def _is_unchanged(versions: list[tuple[Tensor, int]]) -> bool:
    return all(tensor._version == version for tensor, version in versions)


class _Record:
    """One call of a shared module."""

    def __init__(self, task: str, shared: Shared, args: tuple, kwargs: dict) -> None:
        self.task, self.shared, self.args, self.kwargs = task, shared, args, kwargs
        self.inputs = _versions(args, kwargs)  # taken before the call
        self.outputs: list[tuple[Tensor, int]] = []
        self.is_copy = False

    def keep(self, output) -> bool:
        """Notes what was returned; False where it cannot be used again."""
        self.is_copy = self.shared.copies
        try:
            self.output = _copied(output, _clones() if self.is_copy else lambda tensor: tensor)
        except TypeError:
            return False
        self.outputs = _versions(self.output)
        return True

    def suits(self, args: tuple, kwargs: dict) -> bool:
        if not _is_unchanged(self.inputs) or not same_value((self.args, self.kwargs),
                                                            (args, kwargs)):
            return False
        if not _is_unchanged(self.outputs):
            self.shared.copies = True  # from the next image on
            return False
        return True

    def take(self):
        return _copied(self.output, _clones() if self.is_copy else lambda tensor: tensor)


class _Visit:
    """One task's run in a session."""

    def __init__(self, session: Session, name: str) -> None:
        self.session, self.name, self.is_over = session, name, False
        self.prompted = session.prompted[name]
        earlier, later = session.done, [n for n in session.names
                                        if n not in session.done and n != name]
        self.sources: dict[str, set[str]] = {}
        for other in earlier:
            for path in session.paths(other, name):
                self.sources.setdefault(path, set()).add(other)
        self.kept = frozenset().union(*(session.paths(name, other) for other in later))
        self.taken: list[tuple[str, str]] = []

    def run(self, shared: Shared, forward: Callable, args: tuple, kwargs: dict):
        sources = self.sources.get(shared.path, ())
        for record in self.session.records.get(shared.path, ()):
            if record.task in sources and record.suits(args, kwargs):
                self.taken.append((record.task, shared.path))
                return record.take()
        if shared.path not in self.kept:
            return forward(*args, **kwargs)
        record = _Record(self.name, shared, args, kwargs)
        output = forward(*args, **kwargs)
        if record.keep(output):
            self.session.records.setdefault(shared.path, []).append(record)
        return output


class Session:
    """What some tasks have computed on one image; to be used by one thread.

    Args:
        parts (Mapping[str, nn.Module]): The tasks' prompted backbones, in the order of running.
        paths (Callable): Takes the names of two tasks, returns the
            :func:`~mmprotune.models.sharing.shared_paths` of their networks, on which
            :func:`~mmprotune.models.sharing.install` was called.

    Attributes:
        taken (dict[str, list[tuple[str, str]]]): For each task that ran, the modules that it did
            not run itself: whose output was used, and the path.
    """

    def __init__(self, parts: Mapping[str, nn.Module],
                 paths: Callable[[str, str], frozenset[str]]) -> None:
        self.names, self.paths = list(parts), paths
        self.prompted = {name: frozenset(stage.path for stage in part.stages)
                         for name, part in parts.items()}
        self.records: dict[str, list[_Record]] = {}
        self.done: list[str] = []
        self.taken: dict[str, list[tuple[str, str]]] = {}

    @contextlib.contextmanager
    def task(self, name: str) -> Iterator[None]:
        """While open, a task runs on this thread."""
        outer = getattr(running, 'visit', None)
        running.visit = visit = _Visit(self, name)
        try:
            yield
        finally:
            running.visit = outer
            self.done.append(name)
            self.taken[name] = visit.taken
