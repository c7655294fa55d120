"""The residual branches of a backbone, read off the graph of its dry run.

A residual connection is an addition whose operands come from one tensor: one of them is that tensor
(or went through one layer with weights, a projection to another width), the other one came by the
branch. Where that tensor is added to several at once (attention and MLP in parallel), each came by
one. Nothing here knows any particular block: what matters is what is added.
"""
from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from .layout import Layout
from .trace import Graph, Trace

# Nodes of multiplications by weights, as autograd names them.
_WEIGHTED = ('Convolution', 'Conv', 'Addmm', 'Mm', 'Bmm', 'Linear', 'Matmul')
# Nodes that take a part of a tensor: another part of it is no way around.
_PARTS = ('Slice', 'Split', 'Select', 'Unbind', 'Narrow', 'Index')
# Of the two sides of an addition, as bits.
_FIRST, _SECOND = 1, 2

Place = tuple[str, 'int | None']


@dataclass
class _Branch:
    """One residual branch.

    Attributes:
        nodes (list): Nodes of the graph in it, from its end up.
        cuts (list): Those of them that everything in the branch goes through, likewise.
        is_bare (bool): Whether the other operand is the very tensor that the branch starts from.
    """
    nodes: list
    cuts: list
    is_bare: bool


def find_branches(backbone: nn.Module, trace: Trace,
                  narrow: bool) -> dict[str, dict[int | None, Layout]]:
    """The features at the ends of a backbone's residual branches, before their additions.

    Args:
        backbone (nn.Module): The backbone.
        trace (Trace): Its dry run.
        narrow (bool): Whether to take the feature of fewest channels in each branch instead, the
            last one of its resolution, where it has fewer than the end.

    Returns:
        dict[str, dict[int | None, Layout]]: By path of the module that returns the feature, by
        output index; empty where there is no such branch.
    """
    found: dict[str, dict[int | None, Layout]] = {}
    for branch in _branches(trace):
        place = _end(backbone, trace, branch)
        if place and narrow:
            place = _narrowest(backbone, trace, branch, place)
        if place:
            path, index = place
            found.setdefault(path, {})[index] = trace.maps(path)[index]
    return dict(sorted(found.items(), key=lambda item: trace.calls[item[0]].order))


def _branches(trace: Trace) -> Iterator[_Branch]:
    graph = trace.graph
    uses = Counter(below for edges in graph.inputs.values() for below, _ in edges)

    def terms(edges: list[tuple[object, int]]) -> Iterator[tuple[object, int]]:
        for node, output in edges:
            # What a module returns, or something else reads, stands for itself.
            if _is_addition(graph, node) and uses[node] == 1 and node not in trace.makers:
                yield from terms(graph.inputs[node])
            else:
                yield node, output

    for node, edges in graph.inputs.items():
        if not _is_addition(graph, node):
            continue
        branch = _branch(graph, edges)
        if branch:
            yield branch
        summed = list(terms(edges))
        for pair in combinations(summed, 2) if len(summed) > 2 else ():
            branch = _branch(graph, pair)
            if branch and branch.is_bare and uses[branch.nodes[0]] == 1:
                yield branch


def _is_addition(graph: Graph, node: object) -> bool:
    return node.name().startswith('AddBackward') and len(graph.inputs[node]) == 2


def _branch(graph: Graph, operands: Sequence[tuple[object, int]]) -> _Branch | None:
    """The branch of an addition, if it is a residual one.

    Walks up from both operands, last node first, until both have come to one node.
    """
    sides: dict[object, int] = {}
    entered: dict[object, set[tuple[int, int]]] = {}
    heap: list[tuple[int, object]] = []

    def reach(node: object, output: int, side: int) -> None:
        if node not in sides:
            heapq.heappush(heap, (-graph.position[node], node))
        sides[node] = sides.get(node, 0) | side
        entered.setdefault(node, set()).add((side, output))

    (first, i), (second, j) = operands
    reach(first, i, _FIRST)
    reach(second, j, _SECOND)
    nodes: dict[int, list] = {_FIRST: [], _SECOND: []}
    weights = {_FIRST: 0, _SECOND: 0}
    cuts: dict[int, list] = {_FIRST: [], _SECOND: []}
    while len(heap) > 1:
        node = heapq.heappop(heap)[-1]
        side = sides[node]
        if side in nodes:
            nodes[side].append(node)
            weights[side] += node.name().startswith(_WEIGHTED)
            if min(weights.values()) > 1:
                return None
            if not any(sides[other] & side for *_, other in heap):
                cuts[side].append(node)
        for below, output in graph.inputs[node]:
            for one in (_FIRST, _SECOND):
                if side & one:
                    reach(below, output, one)
    if len(heap) != 1 or sides[heap[0][-1]] != _FIRST | _SECOND:
        return None
    entries = entered[heap[0][-1]]
    if {o for s, o in entries if s == _FIRST}.isdisjoint(o for s, o in entries if s == _SECOND):
        return None
    skip, branch = sorted((_FIRST, _SECOND), key=lambda side: (weights[side], len(nodes[side])))
    if weights[skip] > 1 or not nodes[branch] or (
            weights[skip] == weights[branch] and nodes[skip]):
        return None
    if any(node.name().startswith(_PARTS) for node in nodes[skip]):
        return None
    return _Branch(nodes[branch], cuts[branch], is_bare=not nodes[skip])


def _end(backbone: nn.Module, trace: Trace, branch: _Branch) -> Place | None:
    """The last feature in a branch that a module returns; past reshapes and scales only."""
    node, inside = branch.nodes[0], set(branch.nodes)
    while True:
        place = _maker(backbone, trace, node)
        if place:
            return place
        edges = trace.graph.inputs[node]
        if len(edges) != 1 or edges[0][0] not in inside:
            return None
        node = edges[0][0]


def _narrowest(backbone: nn.Module, trace: Trace, branch: _Branch, end: Place) -> Place:
    of_end = trace.maps(end[0])[end[1]]
    best, fewest = end, of_end.channels
    for node in branch.cuts:  # from the end up
        place = _maker(backbone, trace, node, weighted=True)
        if place:
            layout = trace.maps(place[0])[place[1]]
            if layout.stride == of_end.stride and layout.channels < fewest:
                best, fewest = place, layout.channels
    return best


def _maker(backbone: nn.Module, trace: Trace, node: object, weighted: bool = False) -> Place | None:
    """The outermost of the modules that return the feature which a node made, with weights if any
    of them has some: a norm, not the dropout behind it."""
    makers = trace.makers.get(node, [])
    own = [place for place in makers if any(True for _ in
                                            backbone.get_submodule(place[0]).parameters())]
    if weighted:
        makers = own
    return min(own or makers, key=lambda place: place[0].count('.'), default=None)
