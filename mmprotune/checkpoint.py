from .checkpoints.slim import *  # noqa: F403
