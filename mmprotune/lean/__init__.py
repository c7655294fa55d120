from .convert import make_lean, restore, store_weights, unfold

__all__ = ['make_lean', 'restore', 'store_weights', 'unfold']
