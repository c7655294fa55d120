from __future__ import annotations

import hashlib
import json

import torch
from mmengine import __version__ as mmengine_version
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from torch import nn

from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.engine.processes import unwrapped
from mmprotune.errors import FrozenTensorsChanged, OptionError, RanksDisagree, listed
from mmprotune.freezing import FrozenSnapshot, audit
from mmprotune.registry import HOOKS
from mmprotune.version import __version__

from .averaging import average_only_what_trains, averaged_copies, share_frozen


@HOOKS.register_module()
class FreezeGuardHook(Hook):
    """Holds training to the promise that what is frozen does not move.

    Holds the frozen tensors against the fingerprint of their backbone before training, takes a
    digest of each, and compares after the first iterations and at the end. A tensor that moved
    stops training with its name.

    Averages of the model (those of ``EMAHook``, the teacher of ``MeanTeacherHook``) are kept from
    averaging what is frozen, which would move it by rounding, and are looked at in the end too.

    With several processes, the digests, the fingerprints of what each process itself has loaded
    and the versions are compared across them before the first step. (The weights alone would not
    tell: PyTorch's wrapper overwrites everyone's parameters with the first process's.)

    Args:
        check_after (int): Iterations after which the first check is made. Defaults to 2: what
            moves at all (an optimizer step, BatchNorm statistics) has moved by then.

    Raises:
        ValueError: ``check_after`` is no positive int, or the model has no prompted backbone.
        FrozenTensorsChanged: Something frozen moved, or is set up to.
        RanksDisagree: The processes are not of one mind.
    """

    # After every other hook of the iteration, so that what they change is seen too.
    priority = 'LOWEST'

    def __init__(self, check_after: int = 2) -> None:
        if not isinstance(check_after, int) or check_after < 1:
            raise OptionError(f'check_after must be a positive int, got {check_after!r}')
        self.check_after = check_after
        self._snapshot: FrozenSnapshot | None = None
        self._done = 0

    def before_run(self, runner) -> None:
        # Before anything is averaged; the hook that makes a copy has made it by now.
        average_only_what_trains(unwrapped(runner.model), runner.hooks)

    def before_train(self, runner) -> None:
        model = unwrapped(runner.model)
        share_frozen(model, runner.hooks, first=runner.iter == 0)
        self._snapshot = FrozenSnapshot(model)
        if get_world_size() > 1:
            compare_ranks(all_gather_object(_stand(model, self._snapshot)))
        # What init_weights or a hook has made of the weights so far: a snapshot would not tell.
        # After the ranks have been compared: the wrapper gives them the first one's weights.
        audit(model)
        self._done = 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._done += 1
        if self._done == self.check_after:
            audit(unwrapped(runner.model), self._snapshot, training=True)

    def after_train(self, runner) -> None:
        model = unwrapped(runner.model)
        audit(model, self._snapshot)
        for name, average in averaged_copies(runner.hooks):
            moved = self._snapshot.moved(average.module)
            if moved:
                raise FrozenTensorsChanged(f'frozen tensors moved in {name}: {listed(moved)}')


def _stand(model: nn.Module, snapshot: FrozenSnapshot) -> dict[str, str]:
    """What all processes must have in common, as text to compare and to show."""
    stand = {'mmprotune': __version__, 'torch': torch.__version__, 'mmengine': mmengine_version}
    for path, part in prompted_parts(model):
        stand[f'fingerprint of {path or "the model"}'] = part.own_fingerprint
    digests = json.dumps(sorted(snapshot.digests.items())).encode()
    stand['frozen tensors'] = hashlib.sha256(digests).hexdigest()
    return stand


def compare_ranks(stands: list[dict[str, str]]) -> None:
    """Compares what the processes stand for.

    Args:
        stands (list[dict[str, str]]): One of each process, in the order of the ranks.

    Raises:
        RanksDisagree: They differ; the message holds every value that does, and whose it is.
    """
    differing = []
    for key in dict.fromkeys(key for stand in stands for key in stand):
        ranks: dict[str, list[str]] = {}
        for rank, stand in enumerate(stands):
            ranks.setdefault(stand.get(key, 'none'), []).append(str(rank))
        if len(ranks) > 1:
            differing.append(f'{key}: ' + ', '.join(
                f'{value[:16]} on rank {"/".join(of)}' for value, of in ranks.items()))
    if differing:
        raise RanksDisagree('the processes of this run do not belong together: '
                            f'{"; ".join(differing)}. Training was not started')
