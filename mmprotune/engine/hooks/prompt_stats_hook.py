from __future__ import annotations

import contextlib
from collections.abc import Sequence

from mmengine.hooks import Hook
from torch import Tensor, nn
from torch.optim import Optimizer

from mmprotune.checkpoints.slim import prompt_parameters, prompted_parts
from mmprotune.config_nodes import dicts_in, type_name
from mmprotune.engine.processes import unwrapped
from mmprotune.errors import OptionError
from mmprotune.registry import HOOKS

from .stepping import before_step


@HOOKS.register_module()
class PromptStatsHook(Hook):
    """Writes how much the prompts do into the message hub, from where every visualizer shows it.

    Per stage, every ``interval`` iterations and in the last one:

    - ``train/prompt/<stage>/ratio``: norm of the prompt over the norm of the feature it is added
      to, both over the whole batch; no unit;
    - ``train/prompt/<stage>/grad_norm``: L2 norm of the prompt block's gradient at the optimizer
      step, after averaging over processes and after clipping. Where gradients are accumulated, or
      a scaler leaves a step out, it is the next step's.

    After training, the log has the last ratios in one line, also where no visualizer was to write
    so late (``LoggerHook`` leaves iterations out that are no multiple of its own interval).

    Before training, the log says once what trains and what does not: prompts, the rest of the
    backbone and the rest of the model, with their learning rates and weight decays; and warns when
    prompts train at another rate than the rest of the model without a key of their own.

    Args:
        interval (int): Iterations between two records. Defaults to 50.
    """

    # Before the logger hook reads the message hub.
    priority = 'NORMAL'

    def __init__(self, interval: int = 50) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise OptionError(f'interval must be a positive int, got {interval!r}')
        self.interval = interval
        self._parts: list[tuple[str, nn.Module]] = []
        self._open = contextlib.ExitStack()
        self._norms: list[tuple[str, dict]] = []
        self._ratios: dict[str, float] = {}
        self._gradients: dict[str, Tensor] = {}
        self._waits = False
        self._handles: list = []

    def before_train(self, runner) -> None:
        model = unwrapped(runner.model)
        found = prompted_parts(model)
        self._parts = [('' if len(found) == 1 else f'{path}/', part) for path, part in found]
        wrapper = runner.optim_wrapper
        optimizers = [w.optimizer for w in wrapper.values()] if hasattr(wrapper, 'values') \
            else [wrapper.optimizer]
        rates = Rates(model, optimizers)
        runner.logger.info(str(rates))
        if rates.disagree() and not _has_own_key(runner.cfg.get('optim_wrapper')):
            runner.logger.warning(
                'prompts train at another learning rate than the rest of the model. If a '
                'multiplier for the backbone in optim_wrapper.paramwise_cfg.custom_keys does it, '
                "set optim_wrapper.constructor='mmprotune.PromptOptimWrapperConstructor' "
                '(mmprotune.engine.config.set_prompt_rates does), or add the key '
                "'backbone.prompts' with the lr_mult that is meant")
        # Gradients are gone after the step, and not yet averaged or unscaled before it.
        self._handles = [before_step(o, self._note_gradients) for o in optimizers]

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self._norms = [(prefix, self._open.enter_context(part.record_norms()))
                           for prefix, part in self._parts]
            self._waits = True

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self._open.close()
        for prefix, norms in self._norms:
            for stage, (prompt, feature) in norms.items():
                ratio = (prompt / feature.clamp_min(1e-12)).item()
                runner.message_hub.update_scalar(f'train/prompt/{prefix}{stage}/ratio', ratio)
                self._ratios[prefix + stage] = ratio
        for name, norm in self._gradients.items():
            runner.message_hub.update_scalar(f'train/prompt/{name}/grad_norm', norm.item())
        if self._gradients:
            self._waits = False
        self._norms, self._gradients = [], {}

    def after_train(self, runner) -> None:
        self._open.close()
        if self._ratios:
            told = ', '.join(f'{name} {ratio:.3g}' for name, ratio in self._ratios.items())
            runner.logger.info(f'norm of the prompt over that of its feature: {told}')
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note_gradients(self, optimizer, args, kwargs) -> None:
        if not self._waits:
            return
        held = {id(p) for group in optimizer.param_groups for p in group['params']}
        for prefix, part in self._parts:
            for stage, block in part.prompts.items():
                norms = [p.grad.norm() for p in block.parameters()
                         if p.grad is not None and id(p) in held]
                if norms:
                    self._gradients[prefix + stage] = sum(n.float()**2 for n in norms)**0.5


class Rates:
    """At which rate what part of a model trains.

    Args:
        model (nn.Module): The model.
        optimizers (Sequence[Optimizer]): Everything that steps its parameters.

    Attributes:
        trained (dict[str, dict]): For 'prompts', 'rest of the backbone' and 'rest of the model' the
            number of values by learning rate and weight decay; (None, None) is in no optimizer.
        frozen (int): Number of values that do not train.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        # A scheduler that warms up has lowered `lr` already.
        rates = {id(p): (float(group.get('initial_lr', group['lr'])), group.get('weight_decay', 0))
                 for optimizer in optimizers for group in optimizer.param_groups
                 for p in group['params']}
        inside = prompt_parameters(model)
        titles = dict(prompts='prompts', backbone='rest of the backbone')
        kinds = {id(p): titles[group] for group, params in inside.items() for p in params.values()}
        self.trained: dict[str, dict] = {
            'prompts': {}, 'rest of the backbone': {}, 'rest of the model': {}}
        self.frozen = 0
        for param in model.parameters():
            if not param.requires_grad:
                self.frozen += param.numel()
                continue
            kind = kinds.get(id(param), 'rest of the model')
            rate = rates.get(id(param), (None, None))
            self.trained[kind][rate] = self.trained[kind].get(rate, 0) + param.numel()

    def disagree(self) -> bool:
        """Whether prompts have a learning rate that nothing outside the backbone has."""
        prompts, rest = ({lr for lr, _ in self.trained[kind]}
                         for kind in ('prompts', 'rest of the model'))
        return bool(rest) and not prompts <= rest

    def __str__(self) -> str:
        lines = []
        for kind, groups in self.trained.items():
            rates = '; '.join(
                f'{count:,} in no optimizer' if lr is None else
                f'{count:,} at lr {lr:g}, weight decay {decay:g}'
                for (lr, decay), count in groups.items())
            lines.append(f'{kind}: {sum(groups.values()):,}' + (f' ({rates})' if rates else ''))
        return f'parameters that train: {", ".join(lines)}; frozen: {self.frozen:,}'


def _has_own_key(optim_wrapper: object) -> bool:
    """Whether a config of optimizers says at which rate prompts train."""
    return any(type_name(node.get('constructor')) == 'PromptOptimWrapperConstructor' or
               any('prompts' in key for key in node.get('custom_keys') or ())
               for node in dicts_in(optim_wrapper))
