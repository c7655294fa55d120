from .prompted_backbone import PromptedBackbone
from .prompts import (
    AdaptFormerPrompt,
    AffinePrompt,
    ConvAdapterPrompt,
    LinearAdapterPrompt,
    MonaPrompt,
    PromptBlock,
)

__all__ = [
    'AdaptFormerPrompt', 'AffinePrompt', 'ConvAdapterPrompt', 'LinearAdapterPrompt', 'MonaPrompt',
    'PromptBlock', 'PromptedBackbone'
]
