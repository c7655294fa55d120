from .convolution import *  # noqa: F403
