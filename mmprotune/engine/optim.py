"""The learning rate and weight decay of prompts."""
from __future__ import annotations

from collections import Counter

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmprotune.errors import LaunchError
from mmprotune.models import PromptedBackbone
from mmprotune.registry import OPTIM_WRAPPER_CONSTRUCTORS

# What prompts get of the head's learning rate and weight decay, unless a config says otherwise.
PROMPT_MULTIPLIERS = dict(lr_mult=1., decay_mult=1.)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PromptOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, with a learning rate and weight decay of the prompts' own.

    Prompts are named ``backbone.prompts.…``, but what ``custom_keys`` say of ``backbone`` was found
    for weights that were trained before. Here they get

    * what a custom key that names them says (``prompts``, ``backbone.prompts.stage1``), as any
      parameter gets from MMEngine; or else
    * the multipliers of most of the weights in the heads beside the backbone, times
      ``PROMPT_MULTIPLIERS``, or times ``paramwise_cfg.prompts`` where a config has that. All other
      settings of ``paramwise_cfg`` (``norm_decay_mult``, ``bias_lr_mult``, the custom key ``norm``)
      hold for them as for the head.

    Args:
        optim_wrapper_cfg (dict): See MMEngine's.
        paramwise_cfg (dict, optional): See MMEngine's; also ``prompts``, a dict of ``lr_mult`` and
            ``decay_mult``, each 1 unless given. Defaults to None.

    Raises:
        LaunchError: ``prompts`` is anything else.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        own = paramwise_cfg.setdefault('prompts', dict(PROMPT_MULTIPLIERS))
        _check(own)
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        for key, base, value in (('lr_mult', 'lr', self.base_lr),
                                 ('decay_mult', 'weight_decay', self.base_wd)):
            if own.get(key, 1.) != 1 and value is None:
                raise LaunchError(f'optim_wrapper.paramwise_cfg.prompts.{key} multiplies '
                                  f'optim_wrapper.optimizer.{base}, which is not there')
        self._found: dict[int, tuple[str, nn.Module, nn.Module]] = {}

    def __call__(self, model: nn.Module) -> OptimWrapper:
        whole = model.module if hasattr(model, 'module') else model
        for path, part in whole.named_modules():
            if isinstance(part, PromptedBackbone) and len(part.prompts):
                owner = whole.get_submodule(path.rpartition('.')[0])
                self._found[id(part.prompts)] = (path, part, owner)
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '',
                   is_dcn_module: int | float | None = None) -> None:
        """As MMEngine's, for a module and what is in it."""
        if id(module) not in self._found:
            super().add_params(params, module, prefix, is_dcn_module)
            return
        path, part, owner = self._found[id(module)]
        name = f'{path}.prompts' if path else 'prompts'
        given, first = self.paramwise_cfg, len(params)
        keys = given.get('custom_keys') or {}
        # Those that name no more than the way to the prompts are the backbone's.
        self.paramwise_cfg = dict(given, custom_keys={
            key: value for key, value in keys.items()
            if 'prompts' in key or key not in f'{path}.'})
        own = [key for key in self.paramwise_cfg['custom_keys'] if 'prompt' in key]
        super().add_params(params, module, prefix, is_dcn_module)
        self.paramwise_cfg = given
        names = {id(param): f'{name}.{inner}' for inner, param in module.named_parameters()}
        head = self._of_heads(path, part, owner)
        mult = {key: head[key] * given['prompts'].get(key, 1.) for key in head}
        for group in params[first:]:
            if any(key in names[id(group['params'][0])] for key in own):
                continue
            if self.base_lr is not None:
                group['lr'] = group.get('lr', self.base_lr) * mult['lr_mult']
            if self.base_wd is not None:
                group['weight_decay'] = group.get('weight_decay', self.base_wd) * mult['decay_mult']
        if len(params) > first and any(value != 1 for value in mult.values()):
            print_log(f'{path or "prompts"}: the optimizer multiplies the learning rate of prompts '
                      f'by {mult["lr_mult"]:g} and their weight decay by {mult["decay_mult"]:g} '
                      f'(heads: {head["lr_mult"]:g} and {head["decay_mult"]:g}; '
                      f'paramwise_cfg.prompts: {given["prompts"]})', logger='current')

    def _of_heads(self, path: str, part: nn.Module, owner: nn.Module) -> dict[str, float]:
        """The multipliers that most weights in the heads have, by ``custom_keys``; where there is
        no head, those of what holds the backbone."""
        prefix = path.rpartition('.')[0]
        counts: Counter = Counter()
        for name, child in owner.named_children():
            if child is not part and 'head' in name:
                for inner, param in child.named_parameters(f'{prefix}.{name}' if prefix else name):
                    if param.requires_grad:
                        counts[self._multipliers(inner)] += param.numel()
        lr_mult, decay_mult = counts.most_common(1)[0][0] if counts else self._multipliers(
            f'{prefix}.' if prefix else '')
        return dict(lr_mult=lr_mult, decay_mult=decay_mult)

    def _multipliers(self, name: str) -> tuple[float, float]:
        """What ``custom_keys`` say of a parameter: the longest key in its name counts."""
        keys = self.paramwise_cfg.get('custom_keys') or {}
        in_order = sorted(sorted(keys), key=len, reverse=True)
        found = next((keys[key] for key in in_order if key in name), {})
        return found.get('lr_mult', 1.), found.get('decay_mult', 1.)


def _check(own: object) -> None:
    """Refuses anything but multipliers in ``paramwise_cfg.prompts``."""
    where = 'optim_wrapper.paramwise_cfg.prompts'
    if not isinstance(own, dict) or set(own) - {'lr_mult', 'decay_mult'}:
        raise LaunchError(
            f'{where} must be a dict with the keys lr_mult and decay_mult, got {own!r}')
    for key, value in own.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
            raise LaunchError(f'{where}.{key} must be a number that is not negative, got {value!r}')
