"""mmprotune: Pro-tuning of frozen vision backbones for OpenMMLab.

Pro-tuning: Unified Prompt Tuning for Vision Tasks, https://arxiv.org/abs/2207.14381.
Importing the package registers its components with MMEngine; a config that names
``type='mmprotune.…'`` imports it by itself.
"""
from .version import __version__, check_environment

check_environment()

from . import checkpoint  # noqa: E402
from .checkpoints.slim import prompt_parameters  # noqa: E402
from .engine.adapter import load, pack, push  # noqa: E402
from .engine.config import protune  # noqa: E402
from .engine.hooks import (  # noqa: E402
    FreezeGuardHook,
    NonFiniteGuardHook,
    PromptCheckpointHook,
    PromptMapHook,
    PromptStatsHook,
)
from .engine.trunk import FrozenTrunk  # noqa: E402
from .errors import (  # noqa: E402
    FrozenTensorsChanged,
    MMProtuneError,
    NonFiniteError,
    RanksDisagree,
)
from .freezing import FrozenSnapshot, audit  # noqa: E402
from .models import (  # noqa: E402
    AdaptFormerPrompt,
    AffinePrompt,
    ConvAdapterPrompt,
    LinearAdapterPrompt,
    MonaPrompt,
    PromptBlock,
    PromptedBackbone,
)

checkpoint.register()

__all__ = [
    'AdaptFormerPrompt', 'AffinePrompt', 'ConvAdapterPrompt', 'FreezeGuardHook', 'FrozenSnapshot',
    'FrozenTensorsChanged', 'FrozenTrunk', 'LinearAdapterPrompt', 'MMProtuneError', 'MonaPrompt',
    'NonFiniteError', 'NonFiniteGuardHook', 'PromptBlock', 'PromptCheckpointHook', 'PromptMapHook',
    'PromptStatsHook', 'PromptedBackbone', 'RanksDisagree', '__version__', 'audit', 'checkpoint',
    'load', 'pack', 'prompt_parameters', 'protune', 'push'
]
