from .base import BasePrompt
from .prompt_block import PromptBlock

__all__ = ['BasePrompt', 'PromptBlock']
