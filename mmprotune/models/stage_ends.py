"""Where a backbone's stages and blocks end.

A stage end is found from the backbone's own structure by one dry run: the modules that run one
after another along the trunk are grouped by stride and channels, and the last block of each group
ends a stage. In a plain stack of layers the last layer of each resolution does. Nothing here knows
any particular backbone.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .layout import Layout
from .trace import Trace

# A plain stack of blocks at one resolution (a ViT) is cut into this many groups.
PLAIN_GROUPS = 4


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


def _trunk(backbone: nn.Module, trace: Trace) -> list[_Unit]:
    """The blocks that run one after another, from the stem to the end."""
    blocks = _blocks(backbone, '', trace)
    while len(blocks) == 1:  # one module around everything, as timm's models in their wrappers
        inside = _blocks(backbone.get_submodule(blocks[0].path), blocks[0].path, trace)
        if len(inside) < 2 or not _stack_strides(
                blocks[0].path, backbone.get_submodule(blocks[0].path), trace):
            break
        blocks = inside
    return blocks


def find_stage_ends(backbone: nn.Module, trace: Trace) -> dict[str, dict[int | None, Layout]]:
    """The features at the ends of a backbone's stages.

    Args:
        backbone (nn.Module): The backbone.
        trace (Trace): Its dry run.

    Returns:
        dict[str, dict[int | None, Layout]]: By path of the module that ends a stage, by output
        index; empty where no stage is found.
    """
    blocks = _trunk(backbone, trace)
    if not blocks:
        ends = _stack_ends(backbone, trace)
    else:
        groups: list[list[_Unit]] = []
        for unit in blocks:
            if groups and groups[-1][-1].levels == unit.levels:
                groups[-1].append(unit)
            else:
                groups.append([unit])
        ends = (_plain_ends(backbone, blocks) if len(groups) == 1
                else [group[-1] for group in groups])
    return {_outermost(unit.path, trace): unit.maps for unit in ends}


def find_block_ends(backbone: nn.Module, trace: Trace) -> dict[str, dict[int | None, Layout]]:
    """The features at the ends of a backbone's blocks, as :func:`find_stage_ends`."""
    return {unit.path: unit.maps for unit in _all_blocks(backbone, trace)}


def _all_blocks(backbone: nn.Module, trace: Trace) -> list[_Unit]:
    """The blocks of a backbone, or the row of layers that it is, as they run."""
    units = [inner for unit in _trunk(backbone, trace)
             for inner in _innermost(backbone, unit, trace)]
    units = units or [unit for unit, _ in _layers(backbone, '', trace) if unit.is_block]
    return sorted(units, key=lambda unit: unit.order)


def _innermost(backbone: nn.Module, unit: _Unit, trace: Trace) -> list[_Unit]:
    """The blocks that a unit is a stack of, where their features are of its kind; else itself."""
    inside = [_Unit(f'{unit.path}.{name}', maps, trace.calls[f'{unit.path}.{name}'].order, True)
              for name, child in backbone.get_submodule(unit.path).named_modules()
              if name and not _is_container(child) and _is_block(name, child)
              and _is_container(backbone.get_submodule(f'{unit.path}.{name}'.rpartition('.')[0]))
              and (maps := trace.maps(f'{unit.path}.{name}'))]
    # Of blocks in blocks the outer ones, and blocks of other widths are no places of this stack.
    inside = [u for u in inside if not any(u.path.startswith(f'{v.path}.') for v in inside)]
    if len(inside) == 1 and _weights(backbone, inside[0]) < _weights(backbone, unit):
        return [unit]  # a layer of this block: squeeze and excitation, say
    kinds = {level for u in inside for level in u.levels}
    return inside if inside and kinds <= set(unit.levels) else [unit]


def _weights(backbone: nn.Module, unit: _Unit) -> int:
    return sum(p.dim() > 1 for p in backbone.get_submodule(unit.path).parameters())


def find_stem(backbone: nn.Module, trace: Trace) -> dict[str, dict[int | None, Layout]]:
    """The feature that enters the first block, as :func:`find_stage_ends`; empty where no module
    returns it."""
    blocks = _all_blocks(backbone, trace)
    node = trace.calls[blocks[0].path].entry if blocks else None
    while node is not None and node not in trace.makers:  # past reshapes and the like
        edges = trace.graph.inputs.get(node, [])
        node = edges[0][0] if len(edges) == 1 else None
    if node is None:
        return {}
    path, index = trace.makers[node][0]
    return {_outermost(path, trace): {index: trace.maps(path)[index]}}


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
