from .prompt_block import PromptBlock

__all__ = ['PromptBlock']
