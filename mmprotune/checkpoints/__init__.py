"""What a prompted model loads and saves."""
from mmengine.fileio import register_backend
from mmengine.runner import CheckpointLoader

from .reading import read, read_address
from .writing import BACKEND, AtomicLocalBackend

__all__ = ['register']


def register() -> None:
    """Makes MMEngine read checkpoints with :func:`read`, and adds the atomic backend.

    MMEngine 0.10 hands its own checkpoints to ``torch.load`` with defaults that newer PyTorch
    refuses; with this, ``load_from``, ``resume`` and the inferencers read them, and safely.
    """
    CheckpointLoader.register_scheme(
        prefixes='', loader=lambda filename, map_location=None: read(filename, map_location),
        force=True)
    CheckpointLoader.register_scheme(
        prefixes=('http://', 'https://'),
        loader=lambda filename, map_location=None: read_address(filename, map_location), force=True)
    register_backend(BACKEND, AtomicLocalBackend, force=True)
