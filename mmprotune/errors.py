"""Every error of the package, and how its messages name many things.

All stand on :class:`MMProtuneError`: they name their cause, and tools print them without a
traceback. The second base is the built-in class that says the same.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable


class MMProtuneError(Exception):
    """Something that the user can set right; the message says what and where."""


class LaunchError(MMProtuneError, ValueError):
    """A command line or a config key that a tool cannot act on."""


# --- models -----------------------------------------------------------------------------------


class OptionError(MMProtuneError, ValueError):
    """An option of a backbone, a prompt, a hook, a data set, a transform, a metric or an attack
    has a value that it cannot have, or that does not fit what it is used on."""


class OptionTypeError(MMProtuneError, TypeError):
    """An option of a backbone, a prompt, a hook or a data set is of the wrong type."""


class PretrainedFileError(MMProtuneError, ValueError):
    """The pre-trained file is missing, or is not this backbone's."""


class StageError(MMProtuneError, ValueError):
    """The stages of a backbone cannot be found."""


class FrozenLayerError(MMProtuneError, RuntimeError):
    """A lean layer is used in a way in which its gradients would be wrong."""


class FrozenTensorsChanged(MMProtuneError, RuntimeError):
    """A tensor declared frozen is not what it was, or is set up to change."""


# --- checkpoints ------------------------------------------------------------------------------


class CheckpointError(MMProtuneError, ValueError):
    """A checkpoint cannot be used; the message says which and why."""


class UnreadableCheckpoint(CheckpointError):
    """The file is truncated, damaged, no checkpoint, or holds more than data."""


class CheckpointNotWritten(CheckpointError, OSError):
    """A file could not be written: the disk is full, say. What was there before still is."""


class FingerprintMismatch(CheckpointError):
    """The checkpoint was trained on another frozen backbone."""


class FunctionMismatch(FingerprintMismatch):
    """The checkpoint's weights fit, but were trained in a network that computes something else."""


class IncompleteCheckpoint(CheckpointError):
    """Keys are missing, left over, or of other shapes."""


class NonFiniteCheckpoint(CheckpointError):
    """Weights are NaN or infinite."""


# --- trunks -----------------------------------------------------------------------------------


class TrunkError(MMProtuneError, ValueError):
    """A trunk is asked for something that it cannot do; it stays as it was."""


class TaskFailed(MMProtuneError, RuntimeError):
    """Some tasks of a trunk failed on some images.

    Attributes:
        results: What the call would have returned, without the results that there are none of.
    """

    def __init__(self, message: str, results=None) -> None:
        super().__init__(message)
        self.results = results


class DoesNotFit(MMProtuneError, ValueError):
    """A module has no place for a tensor."""


class ExportError(MMProtuneError, RuntimeError):
    """A model cannot be written for another runtime, or computes something else there."""


# --- training and evaluation ------------------------------------------------------------------


class DataError(MMProtuneError, ValueError):
    """A file of images or annotations is broken, or does not fit another; the message names it."""


class NonFiniteError(MMProtuneError, RuntimeError):
    """A loss or a gradient is NaN or infinite."""


class RanksDisagree(MMProtuneError, RuntimeError):
    """The processes of one run have other frozen backbones, or other versions."""


class ClassMapError(MMProtuneError, ValueError):
    """A class map does not fit the classes of the model or of the shifted set."""


class ScenarioError(MMProtuneError, ValueError):
    """A scenario cannot be run with this config."""


def listed(names: Iterable[str], most: int = 5, show: Callable[[str], str] = str) -> str:
    """The first of several names for a message, and how many more there are; 'none' for none."""
    names = [show(name) for name in names]
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'none') + more
