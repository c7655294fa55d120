"""Slim prompt checkpoints: what users of the package call."""
from .checkpoints import register
from .checkpoints.convert import extract, merge, verify
from .checkpoints.loading import full_state_dict, load, problems
from .checkpoints.meta import describe_model, frozen_origins, inspect, origin_hint
from .checkpoints.reading import read
from .checkpoints.resuming import newest
from .checkpoints.slim import prompted_parts, training_names
from .errors import (
    CheckpointError,
    CheckpointNotWritten,
    FingerprintMismatch,
    FunctionMismatch,
    IncompleteCheckpoint,
    NonFiniteCheckpoint,
    UnreadableCheckpoint,
)

__all__ = [
    'CheckpointError', 'CheckpointNotWritten', 'FingerprintMismatch', 'FunctionMismatch',
    'IncompleteCheckpoint', 'NonFiniteCheckpoint', 'UnreadableCheckpoint', 'describe_model',
    'extract', 'frozen_origins', 'full_state_dict', 'inspect', 'load', 'merge', 'newest',
    'origin_hint', 'problems', 'prompted_parts', 'read', 'register', 'training_names', 'verify'
]
