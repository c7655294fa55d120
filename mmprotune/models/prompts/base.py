"""What every prompt block has in common: the interface, and the checks of its config."""
from __future__ import annotations

from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch import Tensor, nn

from mmprotune.errors import OptionError, OptionTypeError


class BasePrompt(BaseModule):
    """Computes the prompt of one feature map; whoever calls adds it to the map.

    A block is registered in ``mmprotune.registry.MODELS`` and takes ``channels``, which
    :class:`~mmprotune.PromptedBackbone` fills in per stage, besides its own arguments. It maps
    (N, C, H, W) to (N, C, H, W) with ``C = channels``, for any H and W. It should start at zero,
    unless ``zero_init=False`` says otherwise (as ``last_stage='serial'`` does for the last stage).

    Where a block can be cut at a narrow place, it defines two methods, and ``forward`` is theirs:

    - ``down(x)`` takes the feature map and returns a hidden tensor of fewer channels,
    - ``up(hidden)`` takes that and returns the prompt.

    Both depend on their argument and the block's parameters only, so that the backward pass may
    compute again what it did not keep; dropout layers of ``torch.nn`` drop the same elements then.
    Any other block defines ``forward(x)`` instead.

    Attributes:
        stands_alone (bool): Whether the prompt may take the feature's place instead of being added
            to it, as ``last_stage='serial'`` has it.
    """
    stands_alone = True

    def forward(self, x: Tensor) -> Tensor:
        """Computes the prompt.

        Args:
            x (Tensor): Feature map of shape (N, C, H, W).

        Returns:
            Tensor: Prompt of the same shape.
        """
        return self.up(self.down(x))

    def down(self, x: Tensor) -> Tensor:
        """The narrow hidden map: what the convolution ``reduce`` makes, unless a block defines it.

        Args:
            x (Tensor): Feature map of shape (N, C, H, W), ``C = channels``.

        Returns:
            Tensor: Of shape (N, hidden, H, W).
        """
        self.check_input(x)
        return self.reduce(x)

    def up(self, hidden: Tensor) -> Tensor:
        """The prompt of the hidden map.

        Args:
            hidden (Tensor): What :meth:`down` returned.

        Returns:
            Tensor: Of shape (N, C, H, W).
        """
        raise NotImplementedError(f'{type(self).__name__} defines neither forward nor up')

    def reset_parameters(self) -> None:
        """Draws the weights anew; a block that does not define this keeps those it has."""

    def init_weights(self) -> None:
        """Draws the weights anew; ``init_cfg`` is applied on top."""
        self.reset_parameters()
        super().init_weights()

    def check_input(self, x: Tensor) -> None:
        """Refuses what is no feature map of ``channels`` channels, with a ValueError."""
        if x.dim() != 4 or x.size(1) != self.channels:
            raise ValueError(f'{type(self).__name__} expects (N, {self.channels}, H, W), '
                             f'got {tuple(x.shape)}')


# --- arguments, named as the config's keys ----------------------------------------------------


def check_count(key: str, value: int) -> None:
    """Refuses what is no positive int.

    Args:
        key (str): The argument's name.
        value (int): Its value.

    Raises:
        TypeError, ValueError: It is none.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionTypeError(f'prompt.{key} must be an int, got {value!r}')
    if value < 1:
        raise OptionError(f'prompt.{key} must be at least 1, got {value}')


def check_number(key: str, value: float) -> None:
    """Refuses what is no number, with a TypeError; arguments as :func:`check_count`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise OptionTypeError(f'prompt.{key} must be a number, got {value!r}')


def check_kernel_size(kernel_size: int) -> None:
    """Refuses all but odd positive ints, with a TypeError or ValueError."""
    check_count('kernel_size', kernel_size)
    if kernel_size % 2 == 0:
        raise OptionError(f'prompt.kernel_size must be odd, got {kernel_size}')


def check_dropout(dropout: float) -> None:
    """Refuses what is no share of elements to drop, with a TypeError or ValueError."""
    check_number('dropout', dropout)
    if not 0 <= dropout < 1:
        raise OptionError(f'prompt.dropout must be at least 0 and less than 1, got {dropout}')


def hidden_of(channels: int, reduction: float) -> int:
    """``channels // reduction``.

    Args:
        channels (int): Channels of the feature map.
        reduction (float): How many times fewer the hidden map has.

    Raises:
        TypeError, ValueError: One of them is none, or no channels would be left.
    """
    check_count('channels', channels)
    check_number('reduction', reduction)
    hidden = int(channels // reduction) if reduction > 0 else 0
    if hidden < 1:
        raise OptionError(f'prompt.reduction={reduction} leaves no hidden channels: '
                          f'expected 0 < reduction <= channels={channels}')
    return hidden


# --- layers named by a config -----------------------------------------------------------------

# mmcv's short names, for environments where mmcv has not registered them.
_ALIASES = {
    'BN': 'BatchNorm2d',
    'SyncBN': 'SyncBatchNorm',
    'IN': 'InstanceNorm2d',
    'GN': 'GroupNorm',
}


def _layer_type(key: str, cfg: dict) -> tuple[type, dict]:
    """The class named by ``cfg['type']`` (MMEngine's registry, then ``torch.nn``), and the rest."""
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise OptionTypeError(f'prompt.{key} must be a dict with the key "type", got {cfg!r}')
    cfg = dict(cfg)
    name = cfg.pop('type')
    if isinstance(name, type):
        return name, cfg
    cls = ROOT_MODELS.module_dict.get(name) or getattr(nn, _ALIASES.get(name, name), None)
    if cls is None:
        raise OptionError(f'prompt.{key}.type={name!r} is neither registered nor in torch.nn')
    return cls, cfg


def build_act(cfg: dict | None) -> nn.Module:
    """The activation of ``act_cfg``; None is no activation."""
    if cfg is None:
        return nn.Identity()
    cls, kwargs = _layer_type('act_cfg', cfg)
    return cls(**kwargs)


def build_norm(cfg: dict | None, channels: int) -> nn.Module:
    """The norm of ``norm_cfg``; None is no norm."""
    if cfg is None:
        return nn.Identity()
    cls, kwargs = _layer_type('norm_cfg', cfg)
    if cls is nn.LayerNorm:
        raise OptionError(f'prompt.norm_cfg.type={cfg["type"]!r} is for channels in the last axis, '
                          "which is the width here; dict(type='GN', num_groups=1) is for maps")
    if not kwargs.pop('requires_grad', True):
        raise OptionError('prompt.norm_cfg.requires_grad=False: prompts always train')
    if issubclass(cls, nn.GroupNorm):
        return cls(num_channels=channels, **kwargs)
    return cls(channels, **kwargs)
