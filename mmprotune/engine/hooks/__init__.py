from .freeze_guard_hook import FreezeGuardHook
from .non_finite_guard_hook import NonFiniteGuardHook
from .prompt_checkpoint_hook import PromptCheckpointHook
from .prompt_map_hook import PromptMapHook
from .prompt_stats_hook import PromptStatsHook

__all__ = [
    'FreezeGuardHook', 'NonFiniteGuardHook', 'PromptCheckpointHook', 'PromptMapHook',
    'PromptStatsHook'
]
