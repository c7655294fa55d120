"""Where a backbone's stages end.

A stage end is found from the backbone's own structure by one dry run: the modules that run one
after another along the trunk are grouped by stride and channels, and the last block of each group
ends a stage. In a plain stack of layers the last layer of each resolution does. Nothing here knows
any particular backbone.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .layout import Layout
from .trace import StageError, Trace, dry_run, read_features

# A plain stack of blocks at one resolution (a ViT) is cut into this many groups.
PLAIN_GROUPS = 4


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
        plain = output[index]
        prompted = self.owner.apply_prompt(self.stage, plain, args, kwargs)
        # Some backbones return one tensor twice: for the next stage and as the feature.
        return type(output)(prompted if item is plain else item for item in output)


class Remarks(list):
    """Sentences on stages that get no prompt.

    Attributes:
        is_last_unread (bool): Whether the last stage is among them.
    """
    is_last_unread = False


@dataclass(frozen=True)
class _Unit:
    """A module on the way through the backbone, and the features it returned, by output index."""
    path: str
    maps: dict[int | None, Layout]
    order: int
    is_block: bool

    @property
    def levels(self) -> tuple[tuple[float, int], ...]:
        """Stride and channels of each feature: what tells one stage from the next."""
        return tuple((layout.stride, layout.channels) for layout in self.maps.values())


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _is_block(path: str, module: nn.Module) -> bool:
    """A block of a stage: more than a layer with its norm and activation, and not the stem."""
    if any(word in path.lower() for word in ('stem', 'embed')):
        return False
    return sum(p.dim() > 1 for p in module.parameters()) > 1


def _stack_strides(path: str, module: nn.Module, trace: Trace) -> set[float]:
    """Strides at which stacks of blocks inside the module run."""
    strides = set()
    for name, child in module.named_modules():
        if name and _is_container(child):
            for key, block in child.named_children():
                inner = f'{path}.{name}.{key}'
                if not _is_container(block) and _is_block(inner, block):
                    strides.update(layout.stride for layout in trace.maps(inner).values())
    return strides


def _is_wrapper(path: str, module: nn.Module, trace: Trace) -> bool:
    """Whether stages end inside the module, not where it returns: it holds stacks of blocks, and
    down-samples after them or hands on what they return one after another."""
    stacks = _stack_strides(path, module, trace)
    maps = trace.maps(path)
    if not stacks:
        return False
    if stacks != {layout.stride for layout in maps.values()}:
        return True
    inside = {
        id(t)
        for p, call in trace.calls.items() if p.startswith(f'{path}.')
        for t in call.tensors.values()
    }
    return len(maps) > 1 and any(id(trace.calls[path].tensors[i]) in inside for i in maps)


def _units(module: nn.Module, path: str, trace: Trace) -> Iterator[_Unit]:
    for name, child in module.named_children():
        inner = f'{path}.{name}' if path else name
        maps = trace.maps(inner)
        if inner not in trace.calls or _is_container(child):
            yield from _units(child, inner, trace)
            continue
        if _is_wrapper(inner, child, trace):
            yield from _units(child, inner, trace)
            continue
        call = trace.calls[inner]
        # A tensor that is returned twice (as the feature and for the next stage) counts once.
        once = {id(call.tensors[i]): i for i in maps}
        maps = {i: layout for i, layout in maps.items() if i in once.values()}
        if maps:
            yield _Unit(inner, maps, call.order, _is_block(inner, child))


def _blocks(module: nn.Module, path: str, trace: Trace) -> list[_Unit]:
    """The blocks inside a module, in the order in which they run."""
    return sorted((u for u in _units(module, path, trace) if u.is_block), key=lambda u: u.order)


def _outermost(path: str, trace: Trace) -> str:
    """The outermost module that returns the very tensors of the one at ``path``."""
    tensors = trace.calls[path].tensors
    parts = path.split('.')
    for n in range(len(parts) - 1, 0, -1):
        parent = '.'.join(parts[:n])
        call = trace.calls.get(parent)
        if call is not None and call.tensors.keys() == tensors.keys() and all(
                call.tensors[i] is t for i, t in tensors.items()):
            path = parent
    return path


def find_stages(backbone: nn.Module,
                stages: str | Sequence[str] = 'auto') -> tuple[list[Stage], Remarks, Trace]:
    """Finds the stage ends of a backbone.

    Args:
        backbone (nn.Module): Takes images of shape (N, 3, H, W).
        stages (str | Sequence[str]): 'auto', or the dotted paths of the modules that end the
            stages. Defaults to 'auto'.

    Returns:
        tuple[list[Stage], Remarks, Trace]: The stages in the order in which they run, remarks on
        stages that were left out (nothing reads them), and the dry run that found them.

    Raises:
        StageError: A path does not exist or returns no feature map, or 'auto' finds nothing; the
            message lists candidates.
        TypeError: ``stages`` is neither 'auto' nor a sequence of strings.
    """
    if isinstance(stages, str) and stages != 'auto':
        raise StageError(f"stages must be 'auto' or a list of module paths, got {stages!r}")
    if not isinstance(stages, str):
        if not isinstance(stages, Sequence) or not all(isinstance(s, str) for s in stages):
            raise TypeError(f"stages must be 'auto' or a list of module paths, got {stages!r}")
        modules = dict(backbone.named_modules())
        for path in stages:
            if path not in modules:
                children = _names(n for n, _ in backbone.named_children())
                raise StageError(f'stages: {type(backbone).__name__} has no module {path!r}; '
                                 f'its children are {children}')
        if not stages:
            raise StageError('stages is an empty list; prompt=None is the way to have no prompts')
    trace = dry_run(backbone)
    remarks = Remarks()
    if isinstance(stages, str):
        found = _auto(backbone, trace)
    else:
        found = {}
        for path in stages:
            found[path] = trace.maps(path)
            if not found[path]:
                raise StageError(
                    f'stages: {path!r} of {type(backbone).__name__} returns no feature map; '
                    f'modules that do: {_names(_candidates(trace))}')
    read = read_features(backbone, trace, found)
    result: list[Stage] = []
    number = 0
    for path in sorted(found, key=lambda p: trace.calls[p].order):
        maps = {i: layout for i, layout in found[path].items() if (path, i) in read}
        for index, layout in found[path].items():
            if index not in maps:
                which = path if index is None else f'{path}[{index}]'
                remarks.append(f'{which} ({layout.channels} channels) gets no prompt: no output of '
                               f'{type(backbone).__name__} depends on it')
        remarks.is_last_unread = not maps
        number += bool(maps)
        for index, layout in maps.items():
            name = f'stage{number}' if len(maps) == 1 else f'stage{number}_{index}'
            result.append(Stage(name, path, index, layout))
    if not result:
        raise StageError(f'stages: no output of {type(backbone).__name__} depends on any stage '
                         f'that was found: {_names(found)}')
    return result, remarks, trace


def _layers(module: nn.Module, path: str, trace: Trace) -> Iterator[tuple[_Unit, bool]]:
    """What a plain stack of layers consists of, and whether each computes with weights.

    A container that stands in a row of others, as ConvMixer's layers do, is one of them; so is
    every other module outside containers that returns a feature (a convolution, an activation).
    """
    for name, child in module.named_children():
        inner = f'{path}.{name}' if path else name
        maps = trace.maps(inner)
        in_a_row = _is_container(child) and _is_container(module) and _is_block(
            inner, child) and not any(map(_is_container, child.children()))
        if _is_container(child) and not (in_a_row and maps):
            yield from _layers(child, inner, trace)
        elif maps and not any(word in inner for word in ('stem', 'embed')):
            unit = _Unit(inner, maps, trace.calls[inner].order, in_a_row)
            yield unit, any(p.dim() > 1 for p in child.parameters())


def _stack_ends(backbone: nn.Module, trace: Trace) -> list[_Unit]:
    """Stage ends of a backbone without blocks, a plain stack of layers: the last layer of each
    resolution at which any has weights; where all are alike, cuts as in a plain ViT."""
    layers = sorted(_layers(backbone, '', trace), key=lambda pair: pair[0].order)
    row = [unit for unit, _ in layers if unit.is_block]
    if len({unit.levels for unit in row}) == 1:
        return _plain_ends(backbone, row)
    ends: dict[tuple[float, ...], _Unit] = {}
    weighted = set()
    for unit, has_weights in layers:
        resolution = tuple(stride for stride, _ in unit.levels)
        ends[resolution] = unit
        if has_weights:
            weighted.add(resolution)
    return [unit for resolution, unit in ends.items() if resolution in weighted]


def _auto(backbone: nn.Module, trace: Trace) -> dict[str, dict[int | None, Layout]]:
    blocks = _blocks(backbone, '', trace)
    while len(blocks) == 1:  # one module around everything, as timm's models in their wrappers
        inside = _blocks(backbone.get_submodule(blocks[0].path), blocks[0].path, trace)
        if len(inside) < 2 or not _stack_strides(
                blocks[0].path, backbone.get_submodule(blocks[0].path), trace):
            break
        blocks = inside
    if not blocks:
        ends = _stack_ends(backbone, trace)
        if not ends:
            raise StageError(
                f'stages: no stage was found in {type(backbone).__name__}; name them with '
                f'stages=[…]; modules that return feature maps: {_names(_candidates(trace))}')
        return {_outermost(unit.path, trace): unit.maps for unit in ends}
    groups: list[list[_Unit]] = []
    for unit in blocks:
        if groups and groups[-1][-1].levels == unit.levels:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    ends = _plain_ends(backbone, blocks) if len(groups) == 1 else [group[-1] for group in groups]
    return {_outermost(unit.path, trace): unit.maps for unit in ends}


def _plain_ends(backbone: nn.Module, blocks: list[_Unit]) -> list[_Unit]:
    """Cuts a stack of blocks at one resolution at the backbone's ``out_indices`` when they name
    several of its blocks, else into equal groups."""
    count = len(blocks)
    indices = getattr(backbone, 'out_indices', None)
    if isinstance(indices, (tuple, list)) and len(indices) > 1:
        cuts = sorted({i % count for i in indices if isinstance(i, int) and -count <= i < count})
        if len(cuts) == len(indices):
            return [blocks[i] for i in cuts]
    groups = min(PLAIN_GROUPS, count)
    return [blocks[math.ceil(count * (g + 1) / groups) - 1] for g in range(groups)]


def _candidates(trace: Trace) -> list[str]:
    return sorted((p for p in trace.calls if trace.maps(p)), key=lambda p: (p.count('.'), p))


def _names(names, most: int = 12) -> str:
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'none') + more
