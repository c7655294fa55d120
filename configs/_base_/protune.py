# Hooks of a run on a frozen backbone. Nothing here belongs to one library or task.
custom_hooks = [
    # Checkpoints that load under torch.load's safe mode and are never half written.
    dict(type='mmprotune.PromptCheckpointHook'),
    # Stops the run when a tensor that was declared frozen has moved.
    dict(type='mmprotune.FreezeGuardHook'),
    # Logs how large the prompts are, stage by stage.
    dict(type='mmprotune.PromptStatsHook'),
]
