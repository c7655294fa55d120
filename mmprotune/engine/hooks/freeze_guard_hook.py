from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from mmprotune.frozen import FrozenSnapshot, audit
from mmprotune.registry import HOOKS


@HOOKS.register_module()
class FreezeGuardHook(Hook):
    """Holds training to the promise that what is frozen does not move.

    Takes a digest of every frozen tensor before training, and compares after the first iterations
    and at the end. A tensor that moved stops training with its name.

    Args:
        check_after (int): Iterations after which the first check is made. Defaults to 2: what
            moves at all (an optimizer step, BatchNorm statistics) has moved by then.

    Raises:
        ValueError: ``check_after`` is no positive int, or the model has no prompted backbone.
        FrozenTensorsChanged: Something frozen moved, or is set up to.
    """

    # After every other hook of the iteration, so that what they change is seen too.
    priority = 'LOWEST'

    def __init__(self, check_after: int = 2) -> None:
        if not isinstance(check_after, int) or check_after < 1:
            raise ValueError(f'check_after must be a positive int, got {check_after!r}')
        self.check_after = check_after
        self._snapshot: FrozenSnapshot | None = None
        self._done = 0

    def before_train(self, runner) -> None:
        self._snapshot = FrozenSnapshot(_unwrapped(runner))
        self._done = 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._done += 1
        if self._done == self.check_after:
            audit(_unwrapped(runner), self._snapshot, training=True)

    def after_train(self, runner) -> None:
        audit(_unwrapped(runner), self._snapshot)


def _unwrapped(runner):
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
