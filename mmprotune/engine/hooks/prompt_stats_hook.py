from __future__ import annotations

import contextlib

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from mmprotune.checkpoint import prompted_parts
from mmprotune.registry import HOOKS


@HOOKS.register_module()
class PromptStatsHook(Hook):
    """Writes how much the prompts do into the message hub, from where every visualizer shows it.

    Per stage, in the iterations that are logged:

    - ``train/prompt/<stage>/ratio``: norm of the prompt over the norm of the feature it is added
      to, both over the whole batch; no unit;
    - ``train/prompt/<stage>/grad_norm``: L2 norm of the prompt block's gradient at the optimizer
      step, after averaging over processes and after clipping.

    Args:
        interval (int): Iterations between two records. Defaults to 50.
    """

    # Before the logger hook reads the message hub.
    priority = 'NORMAL'

    def __init__(self, interval: int = 50) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive int, got {interval!r}')
        self.interval = interval
        self._parts: list[tuple[str, nn.Module]] = []
        self._open = contextlib.ExitStack()
        self._norms: list[tuple[str, dict]] = []
        self._gradients: dict[str, Tensor] = {}
        self._handles: list = []

    def before_train(self, runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        found = prompted_parts(model)
        self._parts = [('' if len(found) == 1 else f'{path}/', part) for path, part in found]
        wrapper = runner.optim_wrapper
        optimizers = [w.optimizer for w in wrapper.values()] if hasattr(wrapper, 'values') \
            else [wrapper.optimizer]
        # Gradients are gone after the step, and not yet averaged or unscaled before it.
        self._handles = [o.register_step_pre_hook(self._note_gradients) for o in optimizers]

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._norms = [(prefix, self._open.enter_context(part.record_norms()))
                           for prefix, part in self._parts]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if not self._norms:
            return
        self._open.close()
        for prefix, norms in self._norms:
            for stage, (prompt, feature) in norms.items():
                runner.message_hub.update_scalar(f'train/prompt/{prefix}{stage}/ratio',
                                                 (prompt / feature.clamp_min(1e-12)).item())
        for name, norm in self._gradients.items():
            runner.message_hub.update_scalar(f'train/prompt/{name}/grad_norm', norm.item())
        self._norms, self._gradients = [], {}

    def after_train(self, runner) -> None:
        self._open.close()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note_gradients(self, optimizer, args, kwargs) -> None:
        if not self._norms:
            return
        for prefix, part in self._parts:
            for stage, block in part.prompts.items():
                norms = [p.grad.norm() for p in block.parameters() if p.grad is not None]
                if norms:
                    self._gradients[prefix + stage] = sum(n.float()**2 for n in norms)**0.5
