from .adaptformer import AdaptFormerPrompt
from .affine import AffinePrompt
from .base import BasePrompt
from .conv_adapter import ConvAdapterPrompt
from .linear_adapter import LinearAdapterPrompt
from .mona import MonaPrompt
from .prompt_block import PromptBlock

__all__ = [
    'AdaptFormerPrompt', 'AffinePrompt', 'BasePrompt', 'ConvAdapterPrompt', 'LinearAdapterPrompt',
    'MonaPrompt', 'PromptBlock'
]
