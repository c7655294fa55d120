"""Where a backbone's stages end, and how its features are laid out.

A stage end is found from the backbone's own structure by one dry run: the modules that run one
after another along the trunk are grouped by stride and channels, and the last block of each group
ends a stage. Nothing here knows any particular backbone.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Image sizes (H, W) tried in turn: not square first, which tells height from width.
DRY_RUN_SIZES = ((64, 96), (128, 192), (224, 224), (256, 256), (384, 384))
# A plain stack of blocks at one resolution (a ViT) is cut into this many groups.
PLAIN_GROUPS = 4
_MAX_EXTRA_TOKENS = 16


@dataclass(frozen=True)
class Layout:
    """How one feature tensor is laid out.

    Attributes:
        kind (str): 'NCHW', 'NHWC' or 'NLC'.
        channels (int): Channels.
        stride (float): Input pixels per feature pixel, rounded to what the dry run shows.
        extra_tokens (int): Leading tokens of an 'NLC' tensor that belong to no pixel (class,
            distillation, register tokens).
    """
    kind: str
    channels: int
    stride: float
    extra_tokens: int = 0


@dataclass(frozen=True)
class Stage:
    """One stage end.

    Attributes:
        name (str): 'stage1', 'stage2', …
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


class StageError(ValueError):
    """The stages of a backbone cannot be found."""


# --- layouts ---------------------------------------------------------------------------------


def token_grid(length: int, image: tuple[int, int], stride: float,
               extra: int) -> tuple[int, int] | None:
    """Height and width of the grid behind ``length`` tokens, ``extra`` of which are no pixels.

    Args:
        length (int): Number of tokens.
        image (tuple[int, int]): Height and width of the input, pixels.
        stride (float): Input pixels per token.
        extra (int): Tokens that belong to no pixel.

    Returns:
        tuple[int, int], optional: (H, W) with ``H * W == length - extra``; None when no grid near
        the image's proportions has that many cells.
    """
    cells = length - extra
    if cells < 1:
        return None
    options = []
    for side, other in ((0, 1), (1, 0)):
        exact = image[side] / stride
        for n in {math.floor(exact), math.ceil(exact), math.floor(exact) + 1}:
            if n >= 1 and cells % n == 0:
                grid = (n, cells // n) if side == 0 else (cells // n, n)
                options.append((abs(grid[other] - image[other] / stride), grid))
    error, grid = min(options, default=(math.inf, None))
    return grid if error < 2 else None


def describe(tensor: Tensor, image: tuple[int, int], batch: int) -> Layout | None:
    """Recognises the layout of a feature tensor.

    Args:
        tensor (Tensor): Any tensor that a module returned for images of shape (N, 3, H, W).
        image (tuple[int, int]): H and W, pixels.
        batch (int): N.

    Returns:
        Layout, optional: None when the tensor is no feature map or token sequence of the batch.
    """
    if not torch.is_floating_point(tensor) or tensor.dim() not in (3, 4) or len(tensor) != batch:
        return None
    if tensor.dim() == 4:
        for kind, (h, w), channels in (('NCHW', tensor.shape[2:], tensor.shape[1]),
                                       ('NHWC', tensor.shape[1:3], tensor.shape[3])):
            if h > image[0] or w > image[1] or h < 1 or w < 1:
                continue
            stride = _round_stride(math.sqrt(image[0] / h * image[1] / w))
            if all(abs(n - side / stride) < 1.5 for n, side in ((h, image[0]), (w, image[1]))):
                return Layout(kind, channels, stride)
        return None
    length, channels = tensor.shape[1:]
    for extra in range(_MAX_EXTRA_TOKENS + 1):
        for stride in (1, 2, 4, 7, 8, 14, 16, 28, 32, 64):
            exact = math.ceil(image[0] / stride) * math.ceil(image[1] / stride)
            if exact + extra == length:
                return Layout('NLC', channels, stride, extra)
    return None


def _round_stride(stride: float) -> float:
    """Snaps to a power of two when close: odd sizes make 64 / 17 out of a stride of 4."""
    power = 2.0**round(math.log2(stride))
    return power if abs(stride / power - 1) < 0.2 else round(stride, 2)


# --- the dry run -----------------------------------------------------------------------------


@dataclass
class _Call:
    """The one call of a module in the dry run; ``nodes`` are the autograd nodes of its tensors."""
    order: int
    tensors: dict[int | None, Tensor]
    nodes: dict[int | None, object]


@dataclass
class _Trace:
    image: tuple[int, int]
    batch: int
    calls: dict[str, _Call]
    upstream: set[int]  # ids of the autograd nodes that the outputs depend on
    keep_alive: list

    def maps(self, path: str) -> dict[int | None, Layout]:
        """Layouts of the features that the module at ``path`` returned; by output index."""
        call = self.calls.get(path)
        if call is None:
            return {}
        found = ((i, describe(t, self.image, self.batch)) for i, t in call.tensors.items())
        return {i: layout for i, layout in found if layout is not None}

    def is_read(self, path: str, index: int | None) -> bool:
        """Whether an output of the backbone depends on this tensor."""
        return id(self.calls[path].nodes.get(index)) in self.upstream


def _tensors(output) -> dict[int | None, Tensor]:
    if isinstance(output, Tensor):
        return {None: output}
    if isinstance(output, (tuple, list)):
        return {i: t for i, t in enumerate(output) if isinstance(t, Tensor)}
    return {}


def _flatten(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _flatten(item)
    elif isinstance(output, dict):
        for item in output.values():
            yield from _flatten(item)


def _trace(backbone: nn.Module, image: tuple[int, int], batch: int = 2) -> _Trace:
    """Runs the backbone once on noise, in eval mode, and records what each module returned."""
    calls: dict[str, _Call] = {}
    repeated: set[str] = set()
    keep_alive: list = []
    handles = []

    def hook(path):

        def record(module, args, output):
            tensors = _tensors(output)
            keep_alive.append(output)
            if path in calls:
                repeated.add(path)
            nodes = {i: t.grad_fn for i, t in tensors.items()}
            calls[path] = _Call(len(keep_alive), tensors, nodes)

        return record

    modes = {m: m.training for m in backbone.modules()}
    first = next(backbone.parameters(), None)
    device = torch.device('cpu') if first is None else first.device
    dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 3, *image, generator=generator).to(device, dtype)
    try:
        for path, module in backbone.named_modules():
            if path:
                handles.append(module.register_forward_hook(hook(path)))
        backbone.eval()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            outputs = list(_flatten(backbone(inputs.requires_grad_(True))))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for path in repeated:  # a module that runs twice ends no stage
        del calls[path]

    upstream: set[int] = set()
    queue = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while queue:
        node = queue.pop()
        if id(node) not in upstream:
            upstream.add(id(node))
            keep_alive.append(node)
            queue += [n for n, _ in node.next_functions if n is not None]
    return _Trace(image, batch, calls, upstream, keep_alive)


def dry_run(backbone: nn.Module) -> _Trace:
    """Runs the backbone on the first image size that it accepts.

    Args:
        backbone (nn.Module): Takes images of shape (N, 3, H, W).

    Raises:
        StageError: No size runs; says the last error.
    """
    sizes = list(DRY_RUN_SIZES)
    fixed = getattr(backbone, 'img_size', None) or getattr(backbone, 'image_size', None)
    if fixed is not None:
        fixed = (fixed, fixed) if isinstance(fixed, int) else tuple(fixed)[-2:]
        sizes.insert(0, fixed)
    error: Exception | None = None
    for image in sizes:
        try:
            return _trace(backbone, image)
        except Exception as e:  # any failure means: not at this size
            error = e
    raise StageError(
        f'backbone: {type(backbone).__name__} ran at none of the image sizes '
        f'{", ".join(f"{h}x{w}" for h, w in sizes)}; the last error: '
        f'{type(error).__name__}: {error}')


# --- from the trace to the stages ------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """A module on the way through the backbone, and one feature it returned."""
    path: str
    index: int | None
    layout: Layout
    order: int
    is_block: bool


def _is_block(path: str, module: nn.Module) -> bool:
    """A block of a stage: more than a layer with its norm and activation, and not the stem."""
    if any(word in path.lower() for word in ('stem', 'embed')):
        return False
    return sum(p.dim() > 1 for p in module.parameters()) > 1


def _stack_strides(path: str, module: nn.Module, trace: _Trace) -> set[float]:
    """Strides at which stacks of blocks inside the module run."""
    strides = set()
    for name, child in module.named_modules():
        if name and isinstance(child, (nn.Sequential, nn.ModuleList)):
            for key, block in child.named_children():
                inner = f'{path}.{name}.{key}'
                if not isinstance(block, (nn.Sequential, nn.ModuleList)) and _is_block(
                        inner, block):
                    strides.update(layout.stride for layout in trace.maps(inner).values())
    return strides


def _units(module: nn.Module, path: str, trace: _Trace) -> Iterator[_Unit]:
    for name, child in module.named_children():
        inner = f'{path}.{name}' if path else name
        maps = trace.maps(inner)
        if inner not in trace.calls or isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _units(child, inner, trace)
            continue
        stacks = _stack_strides(inner, child, trace)
        if stacks and stacks != {layout.stride for layout in maps.values()}:
            # The module's output is not where its blocks end (a downsampling inside, a wrapper).
            yield from _units(child, inner, trace)
            continue
        call = trace.calls[inner]
        for index, layout in maps.items():
            yield _Unit(inner, index, layout, call.order, _is_block(inner, child))


def _outermost(unit: _Unit, trace: _Trace) -> tuple[str, int | None]:
    """The outermost module that returns the very tensor of ``unit``: the stage itself."""
    tensor = trace.calls[unit.path].tensors[unit.index]
    path, index = unit.path, unit.index
    parts = unit.path.split('.')
    for n in range(len(parts) - 1, 0, -1):
        parent = '.'.join(parts[:n])
        call = trace.calls.get(parent)
        if call is not None and list(call.tensors) == [None] and call.tensors[None] is tensor:
            path, index = parent, None
    return path, index


def find_stages(backbone: nn.Module,
                stages: str | Sequence[str] = 'auto') -> tuple[list[Stage], list[str]]:
    """Finds the stage ends of a backbone.

    Args:
        backbone (nn.Module): Takes images of shape (N, 3, H, W).
        stages (str | Sequence[str]): 'auto', or the dotted paths of the modules that end the
            stages. Defaults to 'auto'.

    Returns:
        tuple[list[Stage], list[str]]: The stages in the order in which they run, and remarks on
        stages that were left out (nothing reads them).

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
                raise StageError(f'stages: {type(backbone).__name__} has no module {path!r}; '
                                 f'its children are {_names(n for n, _ in backbone.named_children())}')
        if not stages:
            raise StageError('stages is an empty list; prompt=None is the way to have no prompts')
    trace = dry_run(backbone)
    remarks: list[str] = []
    if isinstance(stages, str):
        found = _auto(backbone, trace, remarks)
    else:
        found = []
        for path in stages:
            maps = trace.maps(path)
            if not maps:
                raise StageError(
                    f'stages: {path!r} of {type(backbone).__name__} returns no feature map; '
                    f'modules that do: {_names(_candidates(trace))}')
            index = min(maps, key=lambda i: -1 if i is None else i)
            found.append((trace.calls[path].order, path, index, maps[index]))
        found = sorted(found, key=lambda f: f[0])
        found = [f[1:] for f in found]
    return [
        Stage(f'stage{n}', path, index, layout)
        for n, (path, index, layout) in enumerate(found, start=1)
    ], remarks


def _auto(backbone: nn.Module, trace: _Trace,
          remarks: list[str]) -> list[tuple[str, int | None, Layout]]:
    units = sorted(_units(backbone, '', trace), key=lambda u: u.order)
    blocks = [u for u in units if u.is_block]
    if not blocks:
        raise StageError(
            f'stages: no stage was found in {type(backbone).__name__}; name them with '
            f'stages=[…]; modules that return feature maps: {_names(_candidates(trace))}')
    groups: list[list[_Unit]] = []
    for unit in blocks:
        if groups and _level(groups[-1][-1]) == _level(unit):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    ends = []
    if len(groups) == 1:
        ends = _plain_ends(backbone, groups[0])
    else:
        ends = [group[-1] for group in groups]
    found = []
    for unit in ends:
        path, index = _outermost(unit, trace)
        if trace.is_read(unit.path, unit.index):
            found.append((path, index, unit.layout))
        else:
            remarks.append(f'{path} ({unit.layout.channels} channels) gets no prompt: no output of '
                           f'{type(backbone).__name__} depends on it')
    if not found:
        raise StageError(f'stages: no output of {type(backbone).__name__} depends on any stage '
                         f'that was found: {_names(u.path for u in ends)}')
    return found


def _level(unit: _Unit) -> tuple[float, int]:
    return unit.layout.stride, unit.layout.channels


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


def _candidates(trace: _Trace) -> list[str]:
    return sorted((p for p in trace.calls if trace.maps(p)), key=lambda p: (p.count('.'), p))


def _names(names, most: int = 12) -> str:
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'none') + more
