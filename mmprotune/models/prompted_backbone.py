"""A frozen backbone with one prompt block per stage.

Pro-tuning: Unified Prompt Tuning for Vision Tasks, Nie et al., https://arxiv.org/abs/2207.14381.
"""
from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence

from mmengine.config import ConfigDict
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmprotune.lean.convert import make_lean, restore, store_weights
from mmprotune.lean.dry_run import tensors_in
from mmprotune.lean.graph import is_recorded
from mmprotune.lean.int8 import scale_names
from mmprotune.lean.options import LeanOptions, LeanReport
from mmprotune.lean.table import lean_type, swap
from mmprotune.registry import MODELS

from . import calls
from .arguments import default_to_none
from .compiling import Compiled, check_compile
from .frozen_backbone import FrozenBackbone
from .identity import function_of
from .insertion import Stage
from .modes import drop_paths, modules_with_mode
from .options import check_arguments
from .pretrained import build_backbone, given_backbone
from .prompting import add_prompts, apply_prompt, attach_prompts
from .trace import StageError, Trace


@MODELS.register_module()
class PromptedBackbone(FrozenBackbone):
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
        backbone (dict | nn.Module): Config of any backbone registered in mmdet, mmseg or
            mmpretrain. Its pre-trained file is its own ``init_cfg`` or ``pretrained``. Or a module
            with its weights, which is changed in place (:meth:`unwrap` gives it back): all of it
            counts as filled by a file, so that ``freeze='pretrained'`` freezes all of it but what
            ``trainable`` names; parameters that do not require a gradient when it comes never train
            (``frozen_stages`` sets that).
        prompt (dict, optional): Config of the prompt block; ``channels`` is filled in per stage.
            None means no prompts. Defaults to ``dict(type='mmprotune.PromptBlock')``.
        stages (str | Sequence[str]): 'auto', or the dotted paths of the modules behind which
            prompts go; ``*`` stands for anything but a dot (``'layer*.*.bn3'``). Defaults to
            'auto': where ``insert`` says.
        freeze (str): 'pretrained' freezes what the pre-trained file filled, the rest trains;
            'all' freezes everything. Defaults to 'pretrained'.
        trainable (Sequence[str]): Regular expressions; parameters whose whole dotted name in the
            backbone one of them matches train too. Defaults to ().
        last_stage (str): 'residual' adds the prompt at the last stage too, 'serial' passes on the
            prompt alone (as the figure draws it; its block then does not start at zero), 'none'
            leaves the last stage without one. Defaults to 'residual'.
        lean (bool | dict): Whether the backward pass through the frozen layers keeps only what
            input gradients need; a dict sets the options of
            :class:`~mmprotune.lean.options.LeanOptions`. Gradients are the same to rounding.
            Defaults to True.
        backbone_dtype (str, optional): 'bfloat16', 'float16' or 'int8' stores the frozen weights of
            convolutions and linear layers in that precision, 'int8' with a scale for each output
            channel; they compute in that of their input, so features are close to the stock
            backbone's, not equal. Needs ``lean``. Defaults to None: as they are.
        pretrained (str, optional): Pre-trained file handed on to a backbone that names none
            itself; segmentors pass it. Defaults to None.
        init_cfg (dict, optional): A ``Pretrained`` config, handed on likewise. Inferencers delete
            it here: it belongs on the wrapped backbone. Defaults to None.
        frozen_from (str, optional): Path or URL of a checkpoint of a whole model (what a run had as
            ``load_from``) whose part for this backbone is loaded after its own file; one of the
            backbone alone does for a backbone that forbids an ``init_cfg``. Defaults to None.
        insert (str): Where prompts go. 'stages': at stage ends, the paper's form; 'blocks': at the
            end of every block; 'branches': inside every residual branch, before its addition;
            'narrow': inside every residual branch where its feature has fewest channels (behind the
            3x3 convolution of a ResNet bottleneck), else as 'branches'; 'outputs': on what the
            backbone returns, so that nothing feeds back into it; 'auto': as 'narrow' where there
            are residual branches, else as 'stages'. All but the first are this package's. Defaults
            to 'stages'; the shipped configs of segmentors and classifiers, and ``--protune`` with
            theirs, say 'auto'.
        stem (bool): Whether a prompt stands behind the stem, too. Defaults to False.
        drop_path (bool): Whether the frozen layers' drop path drops branches in training, at the
            rates that the backbone's config gives it. Defaults to False: like their dropout, it
            stands still.
        compile (bool | dict): Whether ``torch.compile`` compiles the backbone with its prompts, not
            the model around it; a dict holds arguments of ``torch.compile`` (``backend``, ``mode``,
            ``options``, ``dynamic``, ``fullgraph``) and ``activation_memory_budget``, the share of
            what it would keep for the backward pass that it may keep, computing the rest again.
            Where it cannot be compiled, it runs as without, and the log says so. Defaults to False.

    Attributes:
        prompts (nn.ModuleDict): Prompt block by stage name.
        stages (list[Stage]): The stages that have a prompt.
        frozen_names (frozenset[str]): Frozen parameters and buffers, dotted names in ``backbone``.
        lean_report (LeanReport): What ``lean`` did.
        frozen_fingerprint (Tensor): uint8 buffer of shape (32, ), SHA-256 of the frozen tensors.
        frozen_function (Tensor): uint8 buffer, what the backbone computes without and with prompts,
            see :mod:`~mmprotune.models.identity`; zeros where it runs at no usual image size.
        frozen_source (str, optional): The file or address that the frozen weights come from.
        compiled (Compiled, optional): What runs the compiled network; None runs it as it is.

    Raises:
        PretrainedFileError: ``freeze='pretrained'`` without a pre-trained file, or with one that
            fills less than 90% of the backbone. One that cannot be found is an error once the
            backbone is used without a checkpoint that holds it.
        StageError: No stage was found, or a path in ``stages`` is wrong.
        TypeError, ValueError: An argument is of the wrong type or value.
        KeyError: ``backbone.type`` is not registered (MMEngine's message).
    """

    def __init__(self,
                 backbone: dict | nn.Module,
                 prompt: dict | None = dict(type='mmprotune.PromptBlock'),
                 stages: str | Sequence[str] = 'auto',
                 freeze: str = 'pretrained',
                 trainable: Sequence[str] = (),
                 last_stage: str = 'residual',
                 lean: bool | dict = True,
                 backbone_dtype: str | None = None,
                 pretrained: str | None = None,
                 init_cfg: dict | None = None,
                 frozen_from: str | None = None,
                 insert: str = 'stages',
                 stem: bool = False,
                 drop_path: bool = False,
                 compile: bool | dict = False) -> None:
        check_arguments(backbone, prompt, freeze, trainable, last_stage, backbone_dtype, lean,
                        insert, stem, drop_path)
        check_compile(compile)
        if isinstance(backbone, nn.Module):
            built = given_backbone(backbone, pretrained, init_cfg, frozen_from)
        else:
            built = build_backbone(
                ConfigDict(copy.deepcopy(backbone)), pretrained, init_cfg, frozen_from)
        super().__init__(built, everything=freeze == 'all', trainable=trainable)
        self.freeze = freeze
        self.trainable = tuple(trainable)
        self.last_stage = last_stage
        self.insert = insert
        self.lean = lean
        self.frozen_from = frozen_from
        self.compiled: Compiled | None = None
        self.stages: list[Stage] = []
        self.prompts = nn.ModuleDict()
        handle = default_to_none(self.backbone)
        self._handles: list[RemovableHandle] = [] if handle is None else [handle]
        trace = None
        if prompt is not None:
            trace = add_prompts(self, prompt, stages, stem)
        self.frozen_function.copy_(function_of(self, trace=trace))
        self.names_with_mode = modules_with_mode(self, trace)
        if self.prompts and insert == 'outputs' and self.names_with_mode:
            raise StageError(f"insert='outputs': {type(self.backbone).__name__} returns other "
                             'outputs in training, so that it is not known which have a prompt; '
                             "others are 'stages', 'blocks', 'branches', 'narrow'")
        if drop_path:
            self.names_with_mode |= drop_paths(self.backbone)
        self.lean_report = LeanReport()
        if lean is not False:
            self._make_lean(LeanOptions.parse(lean), backbone_dtype, trace)
        self.refresh_fingerprint()
        if compile is not False:
            self.compiled = Compiled(compile)
        self.train()

    # --- construction -------------------------------------------------------------------------

    def _make_lean(self, options: LeanOptions, backbone_dtype: str | None,
                   trace: Trace | None) -> None:
        self.lean_report = make_lean(
            self.backbone, options, root=self, prompts=self.prompts,
            shape=None if trace is None else trace.shape)
        name = type(self.backbone).__name__
        level = logging.WARNING if self.lean_report.remarks else logging.INFO
        print_log(f'lean {name}: {self.lean_report}', logger='current', level=level)
        if backbone_dtype is not None:
            kept = store_weights(self.backbone, backbone_dtype, root=self, key='backbone_dtype')
            self.frozen_names |= scale_names(self.backbone)
            if kept:
                print_log(f'backbone_dtype={backbone_dtype!r}: these stay as they are: '
                          f'{", ".join(kept)}', logger='current', level=logging.WARNING)

    def _norms_replaced(self, names: Sequence[str]) -> None:
        attach_prompts(self)
        for name in names:
            if name in self.lean_report.covered:
                norm = self.backbone.get_submodule(name)
                swap(norm, lean_type(norm), name)

    # --- forward ------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args, **kwargs):
        """Runs the backbone with prompts.

        Args:
            x (Tensor): Images of shape (N, 3, H, W).

        Returns:
            What the wrapped backbone returns.
        """
        self.require_weights()
        if not is_recorded():
            attach_prompts(self)
        outer = calls.current(self) or calls.Call(None)
        call = calls.Call(tuple(x.shape[-2:]), calls.is_plain(self), outer.note)
        with calls.opened(self, call):
            if self.compiled is None:
                outputs = self.backbone(x, *args, **kwargs)
            else:
                outputs = self.compiled(self, x, *args, **kwargs)
        if not is_recorded():
            calls.keep_with_graph(self, call, tensors_in(outputs))
        return outputs

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
        return apply_prompt(self, stage, x, args, kwargs)

    def record_norms(self) -> contextlib.AbstractContextManager[dict[str, tuple[Tensor, Tensor]]]:
        """While open, forwards of this thread note (||P(x)||, ||x||) by stage name in the dict that
        it yields."""
        return self._recorded(lambda prompt, feature, image: (prompt.norm(), feature.norm()))

    def record_maps(self) -> contextlib.AbstractContextManager[
            dict[str, tuple[Tensor, Tensor, tuple[int, int]]]]:
        """As :meth:`record_norms`, with the norms over channels at each pixel of the feature, both
        (N, H, W), and with height and width of the images, pixels."""
        return self._recorded(lambda prompt, feature, image: (
            prompt.norm(dim=1), feature.norm(dim=1), image))

    @contextlib.contextmanager
    def _recorded(self, measure: Callable[[Tensor, Tensor, tuple], tuple]) -> Iterator[dict]:
        found = {}

        def note(name: str, prompt: Tensor, feature: Tensor) -> None:
            found[name] = measure(prompt.detach().float(), feature.detach().float(),
                                  calls.current(self).image)

        outer = calls.current(self) or calls.Call(None)
        with calls.opened(self, calls.Call(outer.image, outer.plain, note)):
            yield found

    @contextlib.contextmanager
    def without_prompts(self) -> Iterator[None]:
        """While open, forwards of this thread run the backbone without its prompts, whatever calls
        it: this module, the model around it or ``backbone`` itself."""
        outer = calls.current(self) or calls.Call(None)
        with calls.opened(self, calls.Call(outer.image, True, outer.note)):
            yield

    def unwrap(self) -> nn.Module:
        """Takes the prompts off the backbone for good, and makes its layers ordinary ones again.

        Its tensors stay as they are: values, precision (``backbone_dtype``) and ``requires_grad``;
        those in 8 bits come back in floating point, with which ordinary layers can compute. What
        is left of this module is a wrapper without prompts, as with ``prompt=None``.

        Returns:
            nn.Module: ``backbone``.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        scales = scale_names(self.backbone)
        restore(self)
        self.frozen_names -= scales
        self.lean_report = LeanReport()
        self.prompts, self.stages = nn.ModuleDict(), []
        self.frozen_function.copy_(self.function_of())
        if scales:
            self.refresh_fingerprint()
        return self.backbone

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
