from .prompt_block import PromptBlock
from .prompted_backbone import PromptedBackbone

__all__ = ['PromptBlock', 'PromptedBackbone']
