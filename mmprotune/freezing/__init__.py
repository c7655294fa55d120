from .audit import FrozenSnapshot, FrozenTensorsChanged, audit
from .filled import FillRecorder
from .fingerprint import digest_tensors, fingerprint
from .freeze import adopt, apply_to_the_rest, freeze, frozen_tensors, keep_frozen_in_eval

__all__ = [
    'FillRecorder', 'FrozenSnapshot', 'FrozenTensorsChanged', 'adopt', 'apply_to_the_rest', 'audit',
    'digest_tensors', 'fingerprint', 'freeze', 'frozen_tensors', 'keep_frozen_in_eval'
]
