"""The lean backward pass: it saves what the gradients need of frozen layers, and no more."""
from .convert import make_lean, restore, store_weights
from .options import LeanOptions, LeanReport

__all__ = ['LeanOptions', 'LeanReport', 'make_lean', 'restore', 'store_weights']
