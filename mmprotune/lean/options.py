"""What can be asked of the lean backward pass, and what it reports."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from mmprotune.errors import OptionError, OptionTypeError, listed


@dataclass
class LeanOptions:
    """What ``lean=dict(…)`` may hold.

    Attributes:
        rounds (bool): Whether outputs may move by rounding: on a CPU linear layers go to oneDNN.
            Undone where a dry run shows other outputs. Configs may call it by its former name,
            ``fold``. Defaults to True.
        recompute (float): Work that the backward pass may do twice, as a share of the frozen
            network's multiplications in a training step. It goes where a multiplication saves most
            bytes: hidden layers of MLPs, queries, keys and values. 0 means nothing, True anything.
            Defaults to 0.08.
        attention (str | bool): 'exact' keeps queries, keys and values, and repeats the host's own
            operations; 'sdpa' uses ``F.scaled_dot_product_attention`` where there is no bias,
            which moves outputs by rounding; False leaves attention as it is. Defaults to 'exact'.
        prompts (str | bool): What prompt blocks keep, computing the rest again: 'output' their
            feature with the prompt added (which the layers behind keep anyway) and their
            bottleneck, 'bottleneck' the feature without it and their bottleneck, 'input' the
            feature without it; False everything. Blocks without a bottleneck keep everything.
            Defaults to 'output'.
    """
    rounds: bool = True
    recompute: float = 0.08
    attention: str | bool = 'exact'
    prompts: str | bool = 'output'

    @classmethod
    def parse(cls, value: bool | Mapping, key: str = 'lean') -> LeanOptions | None:
        """Reads the value of a config key.

        Args:
            value (bool | Mapping): True for the defaults, False for none, or some of the options.
            key (str): The config key, for error messages. Defaults to 'lean'.

        Returns:
            LeanOptions, optional: None for False.

        Raises:
            TypeError, ValueError: The value, or an option in it, is not valid.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, Mapping):
            raise OptionTypeError(f'{key} must be True, False or a dict, got {value!r}')
        value = dict(value)
        rounds = 'fold' if 'fold' in value else 'rounds'
        if rounds == 'fold' and value.setdefault('rounds', value['fold']) != value.pop('fold'):
            raise OptionError(f'{key}.fold is the former name of {key}.rounds, but they differ: '
                              f'remove {key}.fold')
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise OptionError(f'{key} has no option {unknown[0]!r}: expected {", ".join(known)}')
        options = cls(**value)
        if not isinstance(options.rounds, bool):
            raise OptionTypeError(f'{key}.{rounds} must be True or False, got {options.rounds!r}')
        if not isinstance(options.recompute, (bool, int, float)):
            raise OptionTypeError(f'{key}.recompute must be a number, True or False, '
                                  f'got {options.recompute!r}')
        if options.recompute < 0:
            raise OptionError(f'{key}.recompute must not be negative, got {options.recompute}')
        for name, choices in (('attention', ('exact', 'sdpa', False)),
                              ('prompts', ('output', 'bottleneck', 'input', False))):
            chosen = getattr(options, name)
            if chosen is True or chosen not in choices:
                raise OptionError(f'{key}.{name} must be one of {choices}, got {chosen!r}')
        return options

    @property
    def budget(self) -> float:
        """``recompute`` as a number."""
        return float('inf') if self.recompute is True else float(self.recompute)


@dataclass
class LeanReport:
    """What :func:`make_lean` did.

    Attributes:
        covered (dict[str, str]): The stock type of each lean module, by dotted name.
        recomputed (list[str]): Names of the layers that the backward pass applies again.
        ordinary (dict[str, int]): Bytes kept by each module that is not lean, at the size of the
            dry run.
        kept (int): Bytes kept by the whole network in the dry run.
        remarks (list[str]): What did not go as it should.
    """
    covered: dict[str, str] = field(default_factory=dict)
    recomputed: list[str] = field(default_factory=list)
    ordinary: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f'{len(self.covered)} layers are lean, '
                 f'{len(self.recomputed)} layers are computed again in the backward pass']
        if self.ordinary and self.kept:
            most = sorted(self.ordinary, key=self.ordinary.get, reverse=True)
            shares = [f'{name or "the network itself"} {self.ordinary[name] / self.kept:.0%}'
                      for name in most]
            total = sum(self.ordinary.values()) / self.kept
            parts.append(f'ordinary modules keep {total:.0%} of the bytes that are left: '
                         f'{listed(shares)}')
        return '; '.join(parts + self.remarks)
