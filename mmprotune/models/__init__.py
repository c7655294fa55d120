from .prompted_backbone import PromptedBackbone
from .prompts import PromptBlock
from .wrap import protune

__all__ = ['PromptBlock', 'PromptedBackbone', 'protune']
