# Linear probe: the frozen backbone without prompts, the classifier trains.
_base_ = './linear_any_protune_any.py'

model = dict(backbone=dict(prompt=None))
work_dir = 'work_dirs/linear_{{$MMPROTUNE_BACKBONE:r50}}_frozen_{{$MMPROTUNE_DATA:cifar10}}'
