from .prompt_block import PromptBlock
from .prompted_backbone import PromptedBackbone
from .wrap import protune

__all__ = ['PromptBlock', 'PromptedBackbone', 'protune']
