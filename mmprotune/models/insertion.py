"""Where prompts go."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mmprotune.errors import OptionError, OptionTypeError, listed

from .branches import find_branches
from .layout import Layout, describe
from .stage_ends import find_block_ends, find_stage_ends, find_stem
from .trace import StageError, Trace, dry_run, read_features, with_item

# Values of `insert`, and what the prompts there are called. 'auto' is one of the others.
INSERT = dict(stages='stage', blocks='block', branches='branch', narrow='branch', outputs='output',
              auto='')


@dataclass(frozen=True)
class Stage:
    """One stage end.

    A stage whose module returns several features (the branches of an HRNet) has one entry each.

    Attributes:
        name (str): 'stage1', 'stage2', …; 'stage2_0', 'stage2_1', … where there are several.
        path (str): Dotted path of the module whose output is the stage's feature.
        index (int, optional): Position in that output when it is a tuple or list.
        layout (Layout): Layout of the feature.
    """
    name: str
    path: str
    index: int | None
    layout: Layout

    @property
    def channels(self) -> int:
        return self.layout.channels

    @property
    def stride(self) -> float:
        return self.layout.stride


class Tap:
    """Forward hook on the module that ends a stage: returns its output with the prompt added.

    An object, not a closure, so that copies and pickles of the model keep their own prompts.

    Args:
        owner (nn.Module): The prompted backbone.
        stage (Stage): The stage.
    """

    def __init__(self, owner: nn.Module, stage: Stage) -> None:
        self.owner = owner
        self.stage = stage

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        index = self.stage.index
        if index is None:
            return self.owner.apply_prompt(self.stage, output, args, kwargs)
        prompted = self.owner.apply_prompt(self.stage, output[index], args, kwargs)
        return with_item(output, output[index], prompted)


class Remarks(list):
    """Sentences on stages that get no prompt.

    Attributes:
        is_last_unread (bool): Whether the last stage is among them.
    """
    is_last_unread = False


def find_places(backbone: nn.Module,
                stages: str | Sequence[str] = 'auto',
                insert: str = 'stages',
                stem: bool = False) -> tuple[list[Stage], Remarks, Trace]:
    """Finds where prompts go.

    Args:
        backbone (nn.Module): Takes images of shape (N, 3, H, W).
        stages (str | Sequence[str]): 'auto', or the dotted paths of modules by hand; ``*`` stands
            for anything but a dot. Defaults to 'auto'.
        insert (str): One of ``INSERT``; see :class:`~mmprotune.PromptedBackbone`. Defaults to
            'stages'.
        stem (bool): Whether a prompt stands behind the stem, too. Defaults to False.

    Returns:
        tuple[list[Stage], Remarks, Trace]: The places in the order in which they run, remarks on
        those that were left out (nothing reads them, or they run more than once), and the dry run
        that found them.

    Raises:
        StageError: A path does not exist or returns no feature map, or nothing is found; the
            message lists candidates.
        TypeError: ``stages`` is neither 'auto' nor a sequence of strings.
    """
    paths = _by_hand(backbone, stages, insert)
    if paths is not None:
        insert = 'stages'
    trace = dry_run(backbone)
    name = type(backbone).__name__
    if paths is not None:
        found = {path: trace.maps(path) for path in paths}
        for path in paths:
            if path in trace.repeated:
                raise StageError(f'stages: {path!r} of {name} runs more than once; modules that '
                                 'run once and return a feature map: '
                                 f'{_names(_candidates(trace))}')
            if not found[path]:
                raise StageError(f'stages: {path!r} of {name} returns no feature map; '
                                 f'modules that do: {_names(_candidates(trace))}')
    else:
        insert, found = _find(backbone, trace, insert)
    behind_stem = find_stem(backbone, trace) if stem else {}
    if stem and not behind_stem:
        raise StageError(f'stem: no module of {name} returns the feature that enters the first '
                         'block; name it in stages=[…], or set stem=False')
    found = {**{path: dict(maps) for path, maps in behind_stem.items()}, **found}
    read = read_features(
        backbone, trace, ((path, i) for path, maps in found.items() for i in maps))
    result: list[Stage] = []
    remarks, unread = Remarks(), []
    number = 0
    for path in sorted(found, key=lambda p: trace.calls[p].order):
        maps = {i: layout for i, layout in found[path].items() if (path, i) in read}
        for index, layout in found[path].items():
            if index not in maps:
                which = path if index is None else f'{path}[{index}]'
                unread.append(f'{which} ({layout.channels} channels)')
        remarks.is_last_unread = not maps
        if path in behind_stem:
            called = 'stem'
        else:
            number += bool(maps)
            called = f'{INSERT[insert]}{number}'
        for index, layout in maps.items():
            own = called if len(maps) == 1 else f'{called}_{index}'
            if not path:
                own = f'output{index or 0}'
            result.append(Stage(own, path, index, layout))
    if not result:
        raise StageError(f'{"stages" if insert == "stages" else "insert"}: no output of {name} '
                         f'depends on any place that was found: {_names(found)}{_hidden(trace)}')
    if insert == 'outputs':
        features = [t for t in trace.outputs if describe(t, trace.image, trace.batch)]
        inside = len(features) - len(trace.maps(''))
        if inside:
            remarks.append(f'no prompt at {inside} of the features that {name} returns: they are '
                           'further inside, in other tuples, lists or dicts')
    repeated = _repeated(backbone, trace)
    if paths is None and insert != 'outputs' and repeated:
        remarks.append(f'no prompt in {_names(repeated)}: {name} runs them more than once')
    if unread:
        remarks.append(f'no prompt at {_names(unread)}: no output of {name} depends on it'
                       f'{_hidden(trace)}')
    return result, remarks, trace


def _by_hand(backbone: nn.Module, stages: str | Sequence[str], insert: str) -> list[str] | None:
    """The paths that ``stages`` names; None for 'auto'."""
    if isinstance(stages, str):
        if stages != 'auto':
            raise StageError(f"stages must be 'auto' or a list of module paths, got {stages!r}")
        return None
    if not isinstance(stages, Sequence) or not all(isinstance(s, str) for s in stages):
        raise OptionTypeError(f"stages must be 'auto' or a list of module paths, got {stages!r}")
    if insert not in ('stages', 'auto'):
        raise OptionError(f'stages names the places by hand, so insert={insert!r} has no meaning; '
                          'leave one of the two out')
    if not stages:
        raise StageError('stages is an empty list; prompt=None is the way to have no prompts')
    known = [path for path, _ in backbone.named_modules() if path]
    paths: dict[str, None] = {}
    for pattern in stages:
        matcher = re.compile('[^.]*'.join(map(re.escape, pattern.split('*'))))
        matches = [path for path in known if matcher.fullmatch(path)]
        if not matches:
            children = _names(n for n, _ in backbone.named_children())
            raise StageError(f'stages: {type(backbone).__name__} has no module {pattern!r}; '
                             f'its children are {children}')
        paths.update(dict.fromkeys(matches))
    return list(paths)


def _find(backbone: nn.Module, trace: Trace,
          insert: str) -> tuple[str, dict[str, dict[int | None, Layout]]]:
    """What ``insert`` comes to ('auto' is one of the others), and the places."""
    if insert == 'auto':
        found = find_branches(backbone, trace, narrow=True)
        return ('narrow', found) if found else _find(backbone, trace, 'stages')
    name = type(backbone).__name__
    if insert == 'stages':
        found = find_stage_ends(backbone, trace)
        missing = 'no stage was found'
    elif insert == 'blocks':
        found = find_block_ends(backbone, trace)
        missing = 'no block was found'
    elif insert == 'outputs':
        found = {'': trace.maps('')} if trace.maps('') else {}
        missing = 'no feature map is returned as it is, or in a tuple or list,'
    else:
        found = find_branches(backbone, trace, narrow=insert == 'narrow')
        missing = 'no residual branch was found'
    if found:
        return insert, found
    if insert == 'stages':
        raise StageError(f'stages: {missing} in {name}; name them with stages=[…]; modules that '
                         f'return feature maps: {_names(_candidates(trace))}{_hidden(trace)}')
    others = ', '.join(repr(other) for other in INSERT if other not in (insert, 'auto'))
    raise StageError(f'insert={insert!r}: {missing} in {name}; others are {others}, or name the '
                     f'places with stages=[…]; modules that return feature maps: '
                     f'{_names(_candidates(trace))}{_hidden(trace)}')


def _hidden(trace: Trace) -> str:
    """The end of a message, where the graph does not show what layers compute."""
    if any(node.name().startswith('CheckpointFunction') for node in trace.graph.inputs):
        return ('; layers run under reentrant activation checkpointing, which hides them: switch '
                'it off, or call torch.utils.checkpoint with use_reentrant=False')
    return ''


def _repeated(backbone: nn.Module, trace: Trace) -> list[str]:
    """The outermost modules that compute features with weights more than once."""
    return [path for path, module in backbone.named_modules()
            if path in trace.repeated and path.rpartition('.')[0] not in trace.repeated
            and any(p.dim() > 1 for p in module.parameters())]


def _candidates(trace: Trace) -> list[str]:
    return sorted((p for p in trace.calls if p and trace.maps(p)),
                  key=lambda p: (p.count('.'), p))


def _names(names) -> str:
    return listed(names, most=12)
