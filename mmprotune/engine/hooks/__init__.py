from .freeze_guard_hook import FreezeGuardHook, RanksDisagree
from .non_finite_guard_hook import NonFiniteError, NonFiniteGuardHook
from .prompt_checkpoint_hook import PromptCheckpointHook
from .prompt_stats_hook import PromptStatsHook

__all__ = [
    'FreezeGuardHook', 'NonFiniteError', 'NonFiniteGuardHook', 'PromptCheckpointHook',
    'PromptStatsHook', 'RanksDisagree'
]
