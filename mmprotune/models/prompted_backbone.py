"""A frozen backbone with one prompt block per stage.

Pro-tuning: Unified Prompt Tuning for Vision Tasks, Nie et al., https://arxiv.org/abs/2207.14381.
"""
from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmprotune.checkpoints.slim import check_incoming
from mmprotune.frozen import (
    apply_to_the_rest,
    fingerprint,
    freeze,
    frozen_tensors,
    keep_frozen_in_eval,
)
from mmprotune.frozen.dry_run import image_shapes, noise, tensors_in, undisturbed
from mmprotune.frozen.fingerprint import identity
from mmprotune.frozen.kernels import run_channels_last
from mmprotune.frozen.lean import (
    STORAGE_DTYPES,
    LeanOptions,
    LeanReport,
    make_lean,
    store_weights,
)
from mmprotune.frozen.origin import is_recorded, run_folded
from mmprotune.registry import MODELS

from . import calls
from .identity import PROJECTIONS, difference, pack, pinned, summary
from .layout import token_grid
from .pretrained import Built, PretrainedFileError, build_backbone
from .stages import Stage, find_stages


class _Tap:
    """Forward hook on the module that ends a stage: returns its output with the prompt added.

    An object, not a closure, so that copies and pickles of the model keep their own prompts.
    """

    def __init__(self, owner: PromptedBackbone, stage: Stage) -> None:
        self.owner = owner
        self.stage = stage

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        index = self.stage.index
        if index is None:
            return self.owner.apply_prompt(self.stage, output, args, kwargs)
        plain = output[index]
        prompted = self.owner.apply_prompt(self.stage, plain, args, kwargs)
        # Some backbones return one tensor twice: for the next stage and as the feature.
        return type(output)(prompted if item is plain else item for item in output)


@MODELS.register_module()
class PromptedBackbone(BaseModule):
    r"""Freezes a backbone and adds an input-dependent vision prompt at the end of each stage.

    .. math:: x_i = S_i(\hat x_{i-1}), \qquad \hat x_i = x_i + P_i(x_i)

    with the frozen stages :math:`S_i` and the prompt blocks :math:`P_i` (the paper's Figure 2).
    Both the next stage and whatever the backbone returns for the stage see :math:`\hat x_i`. Only
    the :math:`P_i`, and what ``freeze`` and ``trainable`` leave, train.

    The wrapped module is the attribute ``backbone``; its parameter names are the stock ones. Its
    weights are loaded in the constructor, so that every way to build a model (training, testing,
    inferencers) gets the right backbone. The state dict leaves out the frozen tensors and carries
    their fingerprint instead; loading onto another backbone raises.

    Args:
        backbone (dict): Config of any backbone registered in mmdet, mmseg or mmpretrain. Its
            pre-trained file is its own ``init_cfg`` or ``pretrained``.
        prompt (dict, optional): Config of the prompt block; ``channels`` is filled in per stage.
            None means no prompts. Defaults to ``dict(type='mmprotune.PromptBlock')``.
        stages (str | Sequence[str]): 'auto', or the dotted paths of the modules that end the
            stages. Defaults to 'auto'.
        freeze (str): 'pretrained' freezes what the pre-trained file filled, the rest trains;
            'all' freezes everything. Defaults to 'pretrained'.
        trainable (Sequence[str]): Regular expressions; parameters whose whole dotted name in the
            backbone one of them matches train too. Defaults to ().
        last_stage (str): 'residual' adds the prompt at the last stage too, 'serial' passes on the
            prompt alone (as the figure draws it; its block then does not start at zero), 'none'
            leaves the last stage without one. Defaults to 'residual'.
        lean (bool | dict): Whether the backward pass through the frozen layers keeps only what
            input gradients need; a dict sets the options of
            :class:`~mmprotune.frozen.lean.LeanOptions`. Gradients are the same to rounding.
            Defaults to True.
        backbone_dtype (str, optional): 'bfloat16' or 'float16' stores the frozen weights of
            convolutions and linear layers in that precision; they compute in that of their input,
            so features are close to the stock backbone's, not equal. Needs ``lean``. Defaults to
            None: as they are.
        pretrained (str, optional): Pre-trained file handed on to a backbone that names none
            itself; segmentors pass it. Defaults to None.
        init_cfg (dict, optional): A ``Pretrained`` config, handed on likewise. Inferencers delete
            it here: it belongs on the wrapped backbone. Defaults to None.
        frozen_from (str, optional): Path or URL of a checkpoint of a whole model (what a run had as
            ``load_from``) whose part for this backbone is loaded after its own file. Defaults to
            None.

    Attributes:
        prompts (nn.ModuleDict): Prompt block by stage name.
        stages (list[Stage]): The stages that have a prompt.
        frozen_names (frozenset[str]): Frozen parameters and buffers, dotted names in ``backbone``.
        lean_report (LeanReport): What ``lean`` did.
        frozen_fingerprint (Tensor): uint8 buffer of shape (32, ), SHA-256 of the frozen tensors.
        frozen_function (Tensor): uint8 buffer, what the backbone computes without and with prompts,
            see :mod:`~mmprotune.models.identity`; zeros where it runs at no usual image size.
        frozen_source (str, optional): Where the frozen weights come from.

    Raises:
        PretrainedFileError: ``freeze='pretrained'`` without a pre-trained file, or with one that
            fills less than 90% of the backbone. One that cannot be found is an error once the
            backbone is used without a checkpoint that holds it.
        StageError: No stage was found, or a path in ``stages`` is wrong.
        TypeError, ValueError: An argument is of the wrong type or value.
        KeyError: ``backbone.type`` is not registered (MMEngine's message).
    """

    def __init__(self,
                 backbone: dict,
                 prompt: dict | None = dict(type='mmprotune.PromptBlock'),
                 stages: str | Sequence[str] = 'auto',
                 freeze: str = 'pretrained',
                 trainable: Sequence[str] = (),
                 last_stage: str = 'residual',
                 lean: bool | dict = True,
                 backbone_dtype: str | None = None,
                 pretrained: str | None = None,
                 init_cfg: dict | None = None,
                 frozen_from: str | None = None) -> None:
        super().__init__()
        _check_choice('freeze', freeze, ('pretrained', 'all'))
        _check_choice('last_stage', last_stage, ('residual', 'serial', 'none'))
        options = LeanOptions.parse(lean)
        _check_choice('backbone_dtype', backbone_dtype, (None, *STORAGE_DTYPES))
        if backbone_dtype is not None and options is None:
            raise ValueError(f'backbone_dtype={backbone_dtype!r} needs lean layers, but lean=False')
        if isinstance(trainable, str) or not all(isinstance(t, str) for t in trainable):
            raise TypeError(f'trainable must be a list of regular expressions, got {trainable!r}')
        if prompt is not None and (not isinstance(prompt, dict) or 'type' not in prompt):
            raise TypeError(f'prompt must be None or a dict with the key "type", got {prompt!r}')
        if not isinstance(backbone, dict) or 'type' not in backbone:
            raise TypeError(f'backbone must be a dict with the key "type", got {backbone!r}')
        self.freeze = freeze
        self.trainable = tuple(trainable)
        self.last_stage = last_stage
        self.lean = lean
        self.frozen_from = frozen_from
        built = build_backbone(
            ConfigDict(copy.deepcopy(backbone)), pretrained, init_cfg, frozen_from)
        if built.source is None and freeze == 'pretrained':
            raise PretrainedFileError(
                f"freeze='pretrained' needs a pre-trained file, but backbone {backbone['type']!r} "
                "names none (backbone.init_cfg=dict(type='Pretrained', checkpoint=…), on the "
                "wrapped backbone: inferencers delete the wrapper's own); freeze='all' freezes the "
                'backbone as it is, for a full checkpoint to fill it')
        self.backbone = built.module
        self.frozen_source = built.source
        self._missing = built.missing
        self.root_has_mode = False
        self._freeze_backbone(built)
        self.stages: list[Stage] = []
        self.prompts = nn.ModuleDict()
        if prompt is not None:
            self._add_prompts(dict(prompt), stages)
        self.register_buffer('frozen_function', torch.zeros(
            2 * 4 * (PROJECTIONS + 1), dtype=torch.uint8))
        self.register_buffer('frozen_fingerprint', torch.zeros(32, dtype=torch.uint8))
        self.frozen_function.copy_(self.function_of())
        self.root_has_mode = self._returns_more_in_training()
        self.lean_report = LeanReport()
        if options is not None:
            self._make_lean(options, backbone_dtype)
        self.refresh_fingerprint()
        self._register_state_dict_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_after_load)
        self.train()

    # --- construction -------------------------------------------------------------------------

    def _freeze_backbone(self, built: Built) -> None:
        keep = []
        if self.freeze == 'pretrained' and built.missing is None:
            keep = [n for n, _ in self.backbone.named_parameters() if n not in (built.filled or ())]
        self.frozen_names = frozenset(
            freeze(self.backbone, keep=keep, trainable=self.trainable, fixed=built.fixed,
                   key='model.backbone.trainable'))
        trained = [n for n in keep if n not in built.fixed]
        if trained:
            print_log(f'the pre-trained file did not fill {len(trained)} parameters of '
                      f'{type(self.backbone).__name__}; they train: {", ".join(trained)}',
                      logger='current')
        if built.missing is not None:
            print_log(f'{type(self.backbone).__name__} has random weights: {built.source} cannot '
                      f'be had ({built.missing}); a full checkpoint has to fill it',
                      logger='current', level=logging.WARNING)

    def _add_prompts(self, prompt: dict, stages: str | Sequence[str]) -> None:
        found, remarks = find_stages(self.backbone, stages)
        for remark in remarks:
            print_log(remark, logger='current', level=logging.WARNING)
        last = found[-1].path
        if self.last_stage == 'serial' and remarks.is_last_unread:
            raise ValueError("last_stage='serial' passes on the last prompt alone, but no output "
                             f'of {type(self.backbone).__name__} depends on it ({remarks[-1]}); '
                             'let the backbone return feature maps (backbone.out_type, say), or '
                             "use last_stage='residual'")
        if self.last_stage == 'none':
            found = [stage for stage in found if stage.path != last]
        modules = dict(self.backbone.named_modules())
        for stage in found:
            cfg = dict(prompt, channels=stage.channels)
            if self.last_stage == 'serial' and stage.path == last:
                if cfg.get('zero_init') or cfg.get('scale') == 0:
                    raise ValueError("last_stage='serial' passes on the last prompt alone: "
                                     'prompt.zero_init=True or prompt.scale=0 would kill the '
                                     'features; leave both unset')
                cfg['zero_init'] = False
            block = MODELS.build(cfg)
            self.prompts[stage.name] = block
            self.stages.append(stage)
            modules[stage.path].register_forward_hook(_Tap(self, stage), with_kwargs=True)
        if not self.stages:
            raise ValueError(f'no prompt is left: {last} is the only stage and '
                             f'last_stage={self.last_stage!r}; prompt=None is the way to have none')

    def _make_lean(self, options: LeanOptions, backbone_dtype: str | None) -> None:
        self.lean_report = make_lean(self.backbone, options, root=self, prompts=self.prompts)
        name = type(self.backbone).__name__
        level = logging.WARNING if self.lean_report.remarks else logging.INFO
        print_log(f'lean {name}: {self.lean_report}', logger='current', level=level)
        if backbone_dtype is not None:
            kept = store_weights(self.backbone, backbone_dtype, root=self, key='backbone_dtype')
            if kept:
                print_log(f'backbone_dtype={backbone_dtype!r}: these stay as they are: '
                          f'{", ".join(kept)}', logger='current', level=logging.WARNING)

    # --- forward ------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, **kwargs):
        """Runs the backbone with prompts.

        Args:
            x (Tensor): Images of shape (N, 3, H, W).

        Returns:
            What the wrapped backbone returns.
        """
        self.require_weights()
        outer = calls.current(self) or calls.Call(None)
        call = calls.Call(tuple(x.shape[-2:]), outer.plain, outer.norms)
        with calls.opened(self, call):
            if not torch.is_grad_enabled() or not (
                    x.requires_grad or any(p.requires_grad for p in self.parameters())):
                return run_channels_last(self.backbone, x, *args, **kwargs)
            outputs = run_folded(self.backbone, x, *args, **kwargs)
        if self._has_tokens and not is_recorded():
            calls.keep_with_graph(self, call, tensors_in(outputs))
        return outputs

    @property
    def _has_tokens(self) -> bool:
        """Whether a prompt has to know the size of the images."""
        return any(stage.layout.kind == 'NLC' for stage in self.stages)

    @property
    def lacks_weights(self) -> bool:
        """Whether the backbone has random weights, as its file could not be had."""
        return self._missing is not None

    def require_weights(self) -> None:
        """Raises :class:`PretrainedFileError` where the backbone has random weights."""
        if self._missing is not None:
            raise PretrainedFileError(
                f'backbone: {self.frozen_source} cannot be had ({self._missing}), and no full '
                'checkpoint has filled the backbone')

    def apply_prompt(self, stage: Stage, x: Tensor, args: tuple = (), kwargs: dict | None = None):
        """Adds the prompt to one stage's feature (or replaces it, for a serial last stage).

        Args:
            stage (Stage): The stage.
            x (Tensor): Its feature: (N, C, H, W), (N, H, W, C) or (N, L, C).
            args (tuple): Positional arguments of the module that computed it; a pair of ints among
                them that fits the number of tokens is taken for the token grid.
            kwargs (dict, optional): Its keyword arguments, likewise.

        Returns:
            Tensor: The prompted feature, in the same layout.
        """
        call = calls.current(self)
        if call is not None and call.plain:
            return x
        to_map, from_map = self._as_map(stage, x, (*args, *(kwargs or {}).values()))
        block, note = self.prompts[stage.name], None
        if call is not None and call.norms is not None:
            note = partial(_note_norms, call.norms, stage.name)
        serial = self.last_stage == 'serial' and stage.path == self.stages[-1].path
        if not serial and getattr(block, 'lean_adds', False):
            return block(x, to_map, from_map, note)
        feature = to_map(x)
        prompt = block(feature)
        if note is not None:
            note(prompt, feature)
        prompt = from_map(prompt)
        if not serial:
            return x + prompt
        extra = stage.layout.extra_tokens  # which have no prompt to be replaced by
        return torch.cat((x[:, :extra], prompt[:, extra:]), dim=1) if extra else prompt

    def _as_map(self, stage: Stage, x: Tensor, arguments: tuple):
        """The way from the feature to (N, C, H, W), and the way back for the prompt."""
        layout = stage.layout
        if layout.kind == 'NCHW':
            return _unchanged, _unchanged
        if layout.kind == 'NHWC':
            return _channels_first, _channels_last
        extra = layout.extra_tokens
        grid = next((a for a in arguments if isinstance(a, (tuple, list)) and len(a) == 2
                     and all(isinstance(n, int) for n in a) and a[0] * a[1] == x.size(1) - extra),
                    None)
        if grid is None:
            grid = self._grid_of(stage, x)

        def to_map(x: Tensor) -> Tensor:
            return x[:, extra:].transpose(1, 2).reshape(x.size(0), x.size(2), *grid)

        def from_map(prompt: Tensor) -> Tensor:
            tokens = prompt.flatten(2).transpose(1, 2)
            return F.pad(tokens, (0, 0, extra, 0)) if extra else tokens

        return to_map, from_map

    def _grid_of(self, stage: Stage, x: Tensor) -> tuple[int, int]:
        """Height and width of the grid behind the tokens of a stage."""
        extra, stride = stage.layout.extra_tokens, stage.layout.stride
        images = calls.images(self)
        grids = {token_grid(x.size(1), image, stride, extra) for image in images} - {None}
        if len(grids) == 1:
            return grids.pop()
        where = f'{type(self.backbone).__name__}.{stage.path}'
        if grids:
            raise ValueError(
                f'{where}: {x.size(1)} tokens may be a grid of any of {sorted(grids)}: layers are '
                'run again for the backward pass while graphs of images of several sizes are alive;'
                ' switch activation checkpointing off (backbone.with_cp=False), or call backward '
                'before the next forward')
        raise ValueError(
            f'{where}: {x.size(1)} tokens with {extra} extra ones fit no grid of stride '
            f'{stride:g} on images of {images or "unknown size"}; the feature has shape '
            f'{tuple(x.shape)}')

    @contextlib.contextmanager
    def record_norms(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """While open, forwards of this thread note (||P(x)||, ||x||) by stage name in the dict that
        it yields."""
        with calls.opened(self, calls.Call(None, norms={})) as call:
            yield call.norms

    # --- modes, weights, state ----------------------------------------------------------------

    def train(self, mode: bool = True) -> PromptedBackbone:
        """Sets the mode; whatever is frozen stays in eval mode.

        A backbone that returns more in training, for auxiliary heads, is told the mode; its layers
        are not.
        """
        super().train(mode)
        keep_frozen_in_eval(self.backbone)
        if self.root_has_mode:
            self.backbone.training = mode
        return self

    def _returns_more_in_training(self) -> bool:
        """Whether the backbone itself, not a layer of it, returns other outputs in training."""
        forward = getattr(type(self.backbone).forward, '__code__', None)
        if 'training' not in getattr(forward, 'co_names', ()):
            return False
        counts = {}
        for mode in (False, True):
            with undisturbed(self), torch.no_grad():
                self.backbone.training = mode
                for shape in image_shapes(self.backbone):
                    with contextlib.suppress(Exception), \
                            calls.opened(self, calls.Call(shape[1:], plain=True)):
                        images = noise(self.backbone, shape, 2)
                        counts[mode] = len(list(tensors_in(self.backbone(images))))
                        break
        return len(set(counts.values())) == 2

    def init_weights(self) -> None:
        """Draws the prompts' weights anew. The backbone has had its weights since construction.

        Raises:
            PretrainedFileError: It has not, as its file could not be had.
        """
        if self._is_init:
            return
        self.require_weights()
        for prompt in self.prompts.values():
            if hasattr(prompt, 'init_weights'):
                prompt.init_weights()
        self._is_init = True

    def apply(self, fn: Callable[[nn.Module], None]) -> PromptedBackbone:
        """As PyTorch's, except that frozen tensors keep their values: an ``init_cfg`` of the model
        around this backbone draws new weights for all layers of a type in this way.

        Args:
            fn (Callable): Called with every submodule and this module.
        """
        for child in self.children():
            if child is self.backbone:
                apply_to_the_rest(child, fn, self.frozen_names)
            else:
                child.apply(fn)
        fn(self)
        return self

    def _replicate_for_data_parallel(self):
        raise NotImplementedError(
            'PromptedBackbone does not run under nn.DataParallel, whose replicas would share the '
            "first one's prompts; use DistributedDataParallel (tools/dist_train.sh)")

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The frozen parameters and buffers by dotted name in ``backbone``."""
        return frozen_tensors(self.backbone, self.frozen_names)

    def refresh_fingerprint(self) -> None:
        """Computes the fingerprint of the frozen tensors as they are now."""
        tensors = identity(self.frozen_tensors())
        sha = fingerprint(tensors)
        self.frozen_fingerprint.copy_(sha)
        # No buffer: DistributedDataParallel would overwrite it with the first process's.
        self.own_fingerprint = bytes(sha.tolist()).hex()
        self.frozen_dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def function_of(self, frozen: Mapping[str, Tensor] | None = None) -> Tensor:
        """Summarises what the backbone returns for a small image, without prompts and with them,
        where everything that trains has fixed values.

        Args:
            frozen (Mapping[str, Tensor], optional): Other values for the frozen tensors, by dotted
                name in ``backbone``. Defaults to None.

        Returns:
            Tensor: As ``frozen_function``.
        """
        tensors = {f'backbone.{name}': value for name, value in (frozen or {}).items()}
        dtypes = [p.dtype for p in self.parameters() if p.is_floating_point()]
        # Weights that are stored in 16 bits compute in the precision of their input.
        dtype = torch.float32 if torch.float32 in dtypes else next(iter(dtypes), torch.float32)
        found = []
        with pinned(self, [f'backbone.{name}' for name in self.frozen_names], tensors), \
                undisturbed(self), torch.inference_mode(False), torch.no_grad():
            for shape in image_shapes(self.backbone):
                try:
                    for plain in (True, False):
                        torch.manual_seed(0)
                        images = noise(self.backbone, shape, 2).to(dtype)
                        with calls.opened(self, calls.Call(shape[1:], plain)):
                            found.append(summary(tensors_in(self.backbone(images))))
                    return pack(found)
                except Exception:  # whatever it is: not at this size
                    found.clear()
        return torch.zeros_like(self.frozen_function)

    @staticmethod
    def function_distance(first: Tensor, second: Tensor) -> tuple[float, float]:
        """How far two values of ``frozen_function`` are apart, without and with prompts."""
        plain, prompted = difference(first, second)
        return plain, prompted

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        check_incoming(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getattr__(self, name: str):
        """Public attributes that hosts look up on a backbone (``out_indices``, …)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get('_modules', {}).get('backbone')
            if inner is None or name.startswith('_'):
                raise
            return getattr(inner, name)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _note_norms(norms: dict, name: str, prompt: Tensor, feature: Tensor) -> None:
    norms[name] = prompt.detach().float().norm(), feature.detach().float().norm()


def _drop_frozen(module: PromptedBackbone, destination, prefix: str, _) -> None:
    """State-dict hook: leaves out exactly the frozen tensors of this module."""
    for name in module.frozen_names:
        destination.pop(f'{prefix}backbone.{name}', None)


def _after_load(module: PromptedBackbone, incompatible) -> None:
    """Load hook: frozen tensors that a slim file leaves out are not missing."""
    prefix, expected = module.__dict__.pop('_incoming', ('', None))
    frozen = {f'{prefix}backbone.{n}' for n in module.frozen_names}
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in frozen]
    if expected is not None:
        module._missing = None
        expected.verify(module)


def _check_choice(key: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f'{key} must be one of {choices}, got {value!r}')
