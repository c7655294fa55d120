from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmprotune.checkpoints.slim import prompted_parts
from mmprotune.engine.processes import unwrapped
from mmprotune.errors import NonFiniteError, OptionError
from mmprotune.registry import HOOKS

from .stepping import before_step

COUNT = 'mmprotune_nonfinite_steps'


@HOOKS.register_module()
class NonFiniteGuardHook(Hook):
    """Catches a loss or a gradient that is not finite before it reaches the weights.

    Looked at are every term of the loss in every iteration, and the gradients of everything the
    optimizer holds when it is about to step: averaged over processes, unscaled and clipped. What
    is found is told with the iteration, the images of the batch, the terms of the loss, and the
    stages whose prompts got such a gradient (looked at before clipping, which spreads one NaN to
    all parameters).

    A step that ``torch.amp.GradScaler`` leaves out because its scale was too large is no fault and
    is not counted. A loss that is not finite is one with the scaler too: its scale does not act on
    the forward pass.

    All processes decide alike. Every iteration costs one wait for the device and, with several
    processes, one number exchanged.

    Args:
        action (str): 'stop' raises; 'skip' leaves the optimizer step out (with accumulated
            gradients, all that were accumulated), puts back the running statistics of norm layers
            that train, logs a warning and counts it (``skipped``, kept in checkpoints). Defaults
            to 'stop'.
        max_consecutive (int): Steps skipped in a row after which 'skip' stops too. Defaults to 10.

    Raises:
        ValueError: An argument is not one of these.
        NonFiniteError: See ``action``.
    """

    # Before the hooks that take the weights on (an exponential average, checkpoints).
    priority = 'HIGH'

    def __init__(self, action: str = 'stop', max_consecutive: int = 10) -> None:
        if action not in ('stop', 'skip'):
            raise OptionError(f"action must be 'stop' or 'skip', got {action!r}")
        if not isinstance(max_consecutive, int) or max_consecutive < 1:
            raise OptionError(f'max_consecutive must be a positive int, got {max_consecutive!r}')
        self.action = action
        self.max_consecutive = max_consecutive
        self.skipped = 0
        self._in_a_row = 0
        self._handles: list = []

    def before_train(self, runner) -> None:
        self._runner = runner
        self._model = unwrapped(runner.model)
        self._names = {id(p): name for name, p in self._model.named_parameters()}
        if COUNT in runner.message_hub.runtime_info:  # of a resumed run
            self.skipped = runner.message_hub.get_info(COUNT)
        wrapper = runner.optim_wrapper
        self._wrappers = list(wrapper.values()) if hasattr(wrapper, 'values') else [wrapper]
        self._handles = [before_step(w.optimizer, self._before_step) for w in self._wrappers]
        self._handles.append(self._model.register_forward_hook(self._note_losses, with_kwargs=True))
        parts = prompted_parts(self._model)
        for path, part in parts:
            for stage, block in part.prompts.items():
                note = self._note_gradient(stage if len(parts) == 1 else f'{path}/{stage}')
                self._handles += [
                    p.register_hook(note) for p in block.parameters() if p.requires_grad]
        self._begin_step()

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self._stepped:
            self._begin_step()
        self._images += _images(data_batch)
        self._losses: dict[str, Tensor] = {}
        self._checked = False
        # A batch that is not finite spoils these in the forward pass, step or no step.
        self._statistics = [
            (b, b.clone()) for m in self._model.modules() if m.training and isinstance(m, _NormBase)
            for b in m.buffers(recurse=False)] if self.action == 'skip' else []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        # Gradients are being accumulated, or a scaler left the step out: nobody has looked yet.
        if not self._checked:
            self._poisoned = self._look([]) or self._poisoned
        self._stepped = all(wrapper.should_update() for wrapper in self._wrappers)

    def after_train(self, runner) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # --- what is noted on the way -------------------------------------------------------------

    def _begin_step(self) -> None:
        self._images: list[str] = []
        self._gradients: dict[str, Tensor] = {}
        self._poisoned = self._stepped = False

    def _note_losses(self, model, args, kwargs, output) -> None:
        if kwargs.get('mode') == 'loss' and isinstance(output, dict):
            for name, value in output.items():
                values = value if isinstance(value, (list, tuple)) else [value]
                values = [v.detach().float().sum() for v in values if isinstance(v, Tensor)]
                if 'loss' in name and values:  # the others are not in the sum
                    self._losses[name] = sum(values)

    def _note_gradient(self, stage: str):

        def note(gradient: Tensor) -> None:
            largest = gradient.detach().abs().max().float()
            before = self._gradients.get(stage, largest)
            self._gradients[stage] = torch.maximum(before, largest)  # passes NaN on

        return note

    # --- what is decided ----------------------------------------------------------------------

    def _before_step(self, optimizer, args, kwargs) -> None:
        found_inf = getattr(optimizer, 'found_inf', None)
        if found_inf is not None and found_inf.item():
            return  # a fused optimizer: it will leave the step out, as the scaler told it to
        params = [p for group in optimizer.param_groups for p in group['params']
                  if p.grad is not None]
        if self._look(params) or self._poisoned:
            for param in params:
                param.grad = None  # no optimizer touches a parameter without a gradient
        else:
            self._in_a_row = 0

    def _look(self, params: Sequence[nn.Parameter]) -> bool:
        """Whether the iteration's loss, or a gradient, is not finite; tells and counts it then."""
        self._checked = True
        values = list(self._losses.values()) + [p.grad.detach().abs().max().float() for p in params]
        if not values:
            return False
        bad = torch.stack([v.to(values[0].device) for v in values]).isfinite().logical_not()
        anywhere = bad.any().float()
        if get_world_size() > 1:
            all_reduce(anywhere, op='max')
        if not anywhere.item():
            return False
        if self._poisoned:  # told before
            return True
        bad = bad.tolist()
        names = [self._names.get(id(p), '?') for p in params]
        message = self._describe(
            [f'{name} is {value.item():g}' for name, value in self._losses.items()
             if not value.isfinite()],
            [name for name, is_bad in zip(names, bad[len(self._losses):]) if is_bad])
        for buffer, value in self._statistics:
            buffer.copy_(value)
        if self.action == 'stop':
            raise NonFiniteError(f'{message}. The weights are those from before this step')
        self.skipped += 1
        self._in_a_row += 1
        self._runner.message_hub.update_info(COUNT, self.skipped)
        if self._in_a_row > self.max_consecutive:
            raise NonFiniteError(f'{message}. This is step {self._in_a_row} in a row: stopped, as '
                                 f'max_consecutive={self.max_consecutive}')
        self._runner.logger.warning(f'{message}. The step is skipped; {self.skipped} so far')
        return True

    def _describe(self, losses: list[str], params: list[str]) -> str:
        """One sentence about what all processes found."""
        stages = [stage for stage, value in self._gradients.items() if not value.isfinite()]
        found = losses[:]
        if stages:
            found.append('the gradient is not finite in the prompts of ' + ', '.join(stages))
        if params:
            found.append(f'at the optimizer in {len(params)} parameters, {params[0]} the first')
        mine = (', '.join(found), ', '.join(self._images) or 'unknown')
        everyone = all_gather_object(mine) if get_world_size() > 1 else [mine]
        told = [(f'rank {rank}: ' if len(everyone) > 1 else '') +
                f'{found or "nothing of its own"} (images {images})'
                for rank, (found, images) in enumerate(everyone)]
        return (f'not finite in iteration {self._runner.iter + 1} '
                f'(epoch {self._runner.epoch + 1}): {"; ".join(told)}')


def _images(data_batch) -> list[str]:
    """The images of a batch, by id and path, as far as it tells."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    images = []
    for sample in samples if isinstance(samples, (list, tuple)) else ():
        keys = [sample.get(key) for key in ('img_id', 'sample_idx', 'img_path')]
        images.append(' '.join(dict.fromkeys(str(key) for key in keys if key is not None)) or '?')
    return images
