"""Notes which tensors of a module come from a file."""
from __future__ import annotations

from torch import Tensor, nn

from .freeze import own_tensors


class FillRecorder:
    """Records which parameters and buffers state dicts fill while the context is open.

    Works for every way of loading: PyTorch's ``load_state_dict``, MMEngine's, and what backbones do
    with either in their constructor (timm's) or in ``init_weights``. All of them end in
    ``nn.Module._load_from_state_dict``, which is watched meanwhile; nothing else would see loads of
    modules that are only being built.

    Attributes:
        file_shapes (dict[str, tuple]): Keys and shapes of the longest state dict that came, in its
            order.
    """

    def __init__(self) -> None:
        self.file_shapes: dict[str, tuple[int, ...]] = {}
        self._filled: dict[int, Tensor] = {}

    def __enter__(self) -> FillRecorder:
        self._original = original = nn.Module._load_from_state_dict
        recorder = self

        def watched(module, state_dict, prefix, *args, **kwargs):
            if not prefix and len(state_dict) > len(recorder.file_shapes):
                recorder.file_shapes = {
                    k: tuple(v.shape) for k, v in state_dict.items() if isinstance(v, Tensor)}
            result = original(module, state_dict, prefix, *args, **kwargs)
            # Looked at afterwards: hooks may have resized a tensor to fit (position tables).
            recorder._note(module, state_dict, prefix)
            return result

        nn.Module._load_from_state_dict = watched
        return self

    def __exit__(self, *exc_info) -> None:
        nn.Module._load_from_state_dict = self._original

    def _note(self, module: nn.Module, state_dict: dict, prefix: str) -> None:
        for name, tensor in own_tensors(module):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                self._filled[id(tensor)] = tensor  # held, so that the id stays its own

    def filled(self, module: nn.Module) -> set[str]:
        """Dotted names of the parameters and buffers of ``module`` that were filled."""
        tensors = (*module.named_parameters(remove_duplicate=False),
                   *module.named_buffers(remove_duplicate=False))
        return {name for name, tensor in tensors if id(tensor) in self._filled}
