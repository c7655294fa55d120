"""The frozen tensors of several prompted backbones, held once."""
from __future__ import annotations

import contextlib
from collections.abc import Mapping

from torch import Tensor, nn

from mmprotune.errors import TrunkError
from mmprotune.freezing import adopt, fingerprint
from mmprotune.freezing.fingerprint import identity

from .pretrained import filled_by
from .sharing import is_same_storage


class Trunk:
    """The frozen tensors of all prompted backbones with one fingerprint.

    Args:
        part (nn.Module): The first of them, on its device; its tensors become everybody's.

    Attributes:
        key (str): The fingerprint, hexadecimal.
        tensors (dict[str, Tensor]): By dotted name in the backbone.
        kind (str): Name of the backbone's class.
    """

    def __init__(self, part: nn.Module) -> None:
        self.key: str = part.own_fingerprint
        self.tensors = {name: t.detach() for name, t in part.frozen_tensors().items()}
        self.kind = type(part.backbone).__name__

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def filling(self) -> contextlib.AbstractContextManager:
        """While open, backbones that are built on this thread come with the trunk's tensors; where
        those are not on the CPU, with a copy that :meth:`share` takes off again."""
        return filled_by({name: tensor.cpu() for name, tensor in self.tensors.items()})

    def without_frozen(self, state_dict: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
        """A state dict without the frozen tensors, where it has this trunk's.

        Args:
            state_dict (Mapping[str, Tensor]): Of a whole model, slim or full.
            root (str): What keys of the prompted backbone begin with.

        Raises:
            TrunkError: It has others, though it says that it has these.
        """
        start = f'{root}backbone.'
        own = {name: state_dict[start + name] for name in self.tensors
               if start + name in state_dict}
        if not own:
            return dict(state_dict)
        found = fingerprint(identity(own))
        if bytes(found.tolist()).hex() != self.key:
            raise TrunkError('the frozen tensors in the checkpoint do not match the fingerprint in '
                             'it; the file is damaged, or was put together from two')
        drop = {start + name for name in own}
        return {key: tensor for key, tensor in state_dict.items() if key not in drop}

    def share(self, part: nn.Module) -> None:
        """Lets a prompted backbone of the same fingerprint hold the trunk's tensors.

        Args:
            part (nn.Module): The prompted backbone; its own tensors are given back.

        Raises:
            TrunkError: It is of another fingerprint.
        """
        if part.own_fingerprint != self.key:
            raise TrunkError(f'expected frozen tensors of fingerprint {self.key[:16]}…, got '
                             f'{part.own_fingerprint[:16]}…')
        own = part.frozen_tensors()
        adopt(part.backbone, {name: self.tensors[name] for name in own if name in self.tensors})

    def is_shared_by(self, part: nn.Module) -> bool:
        """Whether every frozen tensor of a prompted backbone is the trunk's own, in memory."""
        own = part.frozen_tensors()
        return all(name in own and is_same_storage(own[name], tensor)
                   for name, tensor in self.tensors.items())
