"""A frozen backbone, and by what it is known again."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmprotune.checkpoints.slim import check_incoming
from mmprotune.freezing import (
    apply_to_the_rest,
    fingerprint,
    frozen_tensors,
    keep_frozen_in_eval,
)
from mmprotune.freezing.fingerprint import identity

from .identity import PACKED_BYTES, ROUNDING, difference, function_of
from .norms import stop_synchronising
from .pretrained import Built, PretrainedFileError, freeze_built


class FrozenBackbone(BaseModule):
    """Holds a backbone and keeps its frozen tensors as they are: whatever sets modes, draws weights
    or loads a checkpoint.

    The state dict leaves the frozen tensors out and carries their fingerprint instead; loading onto
    another backbone raises.

    Args:
        built (Built): The backbone with its weights.
        everything (bool): Whether all of it is frozen, not only what a pre-trained file filled.
        trainable (Sequence[str]): Regular expressions of parameters that train all the same.

    Attributes:
        backbone (nn.Module): The backbone.
        frozen_names (frozenset[str]): Frozen parameters and buffers, dotted names in ``backbone``.
        names_with_mode (frozenset[str]): Modules of ``backbone`` that are told the mode.
    """

    def __init__(self, built: Built, everything: bool, trainable: Sequence[str]) -> None:
        super().__init__()
        self.backbone = built.module
        self.frozen_source = built.source
        self._missing = built.missing
        self.names_with_mode: frozenset[str] = frozenset()
        self.frozen_names = freeze_built(built, everything=everything, trainable=trainable)
        stop_synchronising(self.backbone, self.frozen_names)
        self.register_buffer('frozen_function', torch.zeros(PACKED_BYTES, dtype=torch.uint8))
        self.register_buffer('frozen_fingerprint', torch.zeros(32, dtype=torch.uint8))
        self._register_state_dict_hook(_drop_frozen)
        self.register_load_state_dict_post_hook(_after_load)

    # --- weights and modes --------------------------------------------------------------------

    @property
    def lacks_weights(self) -> bool:
        """Whether the backbone has random weights, as its file could not be had."""
        return self._missing is not None

    def require_weights(self) -> None:
        """Raises :class:`PretrainedFileError` where the backbone has random weights."""
        if self._missing is not None:
            raise PretrainedFileError(
                f'backbone: {self.frozen_source} cannot be had ({self._missing}), and no full '
                'checkpoint has filled the backbone; a local file may be named in its '
                'place, most often by model.backbone.backbone.init_cfg.checkpoint')

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Sets the mode; whatever is frozen stays in eval mode.

        Where a backbone returns more in training (for auxiliary heads, or in several branches),
        the modules that decide about that are told the mode, with ``drop_path=True`` those that
        drop branches, and no others.
        """
        # A Runner with `sync_bn` has made them of every norm.
        names = stop_synchronising(self.backbone, self.frozen_names)
        if names:
            self._norms_replaced(names)
        super().train(mode)
        keep_frozen_in_eval(self.backbone)
        for name in self.names_with_mode:
            self.backbone.get_submodule(name).training = mode
        return self

    def _norms_replaced(self, names: Sequence[str]) -> None:
        """Called when other modules have taken the places of frozen norms."""

    def apply(self, fn: Callable[[nn.Module], None]) -> FrozenBackbone:
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

    # --- what is frozen, and what it computes ------------------------------------------------

    def frozen_tensors(self) -> dict[str, Tensor]:
        """The frozen parameters and buffers by dotted name in ``backbone``."""
        return frozen_tensors(self.backbone, self.frozen_names)

    def refresh_fingerprint(self) -> None:
        """Computes the fingerprint of the frozen tensors as they are now, and where it is another
        one, what they compute."""
        tensors = identity(self.frozen_tensors())
        sha = fingerprint(tensors)
        self.frozen_fingerprint.copy_(sha)
        # No buffer: DistributedDataParallel would overwrite it with the first process's.
        before = self.__dict__.get('own_fingerprint')
        self.own_fingerprint = bytes(sha.tolist()).hex()
        if before not in (None, self.own_fingerprint):
            self.refresh_function()
        self.frozen_dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def refresh_function(self) -> None:
        """Computes ``frozen_function`` anew; rounding alone does not change it, so that the same
        backbone gives the same file."""
        function = self.function_of()
        if not self.frozen_function.any() or \
                max(difference(function, self.frozen_function)) > ROUNDING:
            self.frozen_function.copy_(function)

    def function_of(self, frozen: Mapping[str, Tensor] | None = None,
                    former: bool = False) -> Tensor:
        """What ``frozen_function`` would be now, or with other values for the frozen tensors; see
        :func:`mmprotune.models.identity.function_of`."""
        return function_of(self, frozen, former=former)

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


def _drop_frozen(module: FrozenBackbone, destination, prefix: str, _) -> None:
    """State-dict hook: leaves out exactly the frozen tensors of this module."""
    for name in module.frozen_names:
        destination.pop(f'{prefix}backbone.{name}', None)


def _after_load(module: FrozenBackbone, incompatible) -> None:
    """Load hook: frozen tensors that a slim file leaves out are not missing."""
    prefix, expected = module.__dict__.pop('_incoming', ('', None))
    frozen = {f'{prefix}backbone.{n}' for n in module.frozen_names}
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in frozen]
    if expected is not None:
        module._missing = None
        expected.verify(module)
