from .prompted_backbone import PromptedBackbone
from .prompts import PromptBlock

__all__ = ['PromptBlock', 'PromptedBackbone']
