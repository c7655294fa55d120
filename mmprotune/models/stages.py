"""Where a backbone's stages end, and how its features are laid out.

A stage end is found from the backbone's own structure by one dry run: the modules that run one
after another along the trunk are grouped by stride and channels, and the last block of each group
ends a stage. Nothing here knows any particular backbone.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Image sizes (H, W) tried in turn: not square first, which tells height from width.
DRY_RUN_SIZES = ((64, 96), (128, 192), (224, 224), (256, 256), (384, 384))
# A plain stack of blocks at one resolution (a ViT) is cut into this many groups.
PLAIN_GROUPS = 4
_MAX_EXTRA_TOKENS = 16
_BATCH = 2


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
        options = []
        for kind, (h, w), channels in (('NCHW', tensor.shape[2:], tensor.shape[1]),
                                       ('NHWC', tensor.shape[1:3], tensor.shape[3])):
            if not (1 <= h <= image[0] and 1 <= w <= image[1]):
                continue
            stride = _round_stride(math.sqrt(image[0] / h * image[1] / w))
            if all(abs(n - side / stride) < 1.5 for n, side in ((h, image[0]), (w, image[1]))):
                # The image's proportions tell which two axes are the spatial ones.
                skew = abs(math.log(image[0] / h * w / image[1]))
                options.append((skew, kind, channels, stride))
        if not options:
            return None
        _, kind, channels, stride = min(options, key=lambda option: option[0])
        return Layout(kind, channels, stride)
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
    """The one call of a module in the dry run: when it ended, and the tensors it returned."""
    order: int
    tensors: dict[int | None, Tensor]


@dataclass
class _Trace:
    image: tuple[int, int]
    batch: int
    calls: dict[str, _Call]

    def maps(self, path: str) -> dict[int | None, Layout]:
        """Layouts of the features that the module at ``path`` returned; by output index."""
        call = self.calls.get(path)
        if call is None:
            return {}
        found = ((i, describe(t, self.image, self.batch)) for i, t in call.tensors.items())
        return {i: layout for i, layout in found if layout is not None}


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


@contextlib.contextmanager
def _dry(backbone: nn.Module, image: tuple[int, int], hook: Callable[[str], Callable]):
    """Eval mode and a forward hook on every submodule; yields a function that runs the backbone on
    noise. Everything is as before afterwards, the state of the random generator included."""
    modes = {m: m.training for m in backbone.modules()}
    handles = [
        module.register_forward_hook(hook(path)) for path, module in backbone.named_modules()
        if path
    ]
    first = next(backbone.parameters(), torch.zeros(0))
    dtype = first.dtype if first.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_BATCH, 3, *image, generator=generator).to(first.device, dtype)
    try:
        backbone.eval()
        with torch.random.fork_rng(devices=[]):
            yield lambda: backbone(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _trace(backbone: nn.Module, image: tuple[int, int]) -> _Trace:
    """Runs the backbone once and records what each module returned."""
    calls: dict[str, _Call] = {}
    repeated: set[str] = set()

    def hook(path):

        def record(module, args, output):
            if path in calls:
                repeated.add(path)
            # Holding on to the tensors keeps their identities from being given out again.
            calls[path] = _Call(len(calls), _tensors(output))

        return record

    with _dry(backbone, image, hook) as run, torch.no_grad():
        run()
    for path in repeated:  # a module that runs twice ends no stage
        del calls[path]
    return _Trace(image, _BATCH, calls)


def _read(backbone: nn.Module, trace: _Trace, ends: Iterable[str]) -> set[tuple[str, int | None]]:
    """Which of the features at the stage ends an output of the backbone depends on: a zero that
    requires a gradient is added to each, and looked for in the graph behind the outputs."""
    ends = set(ends)
    zeros: dict[int, tuple[str, int | None]] = {}
    keep_alive: list = []

    def hook(path):

        def add(module, args, output):
            if path not in ends:
                return None

            def marked(index, tensor):
                zero = torch.zeros((), dtype=tensor.dtype, device=tensor.device, requires_grad=True)
                zeros[id(zero)] = (path, index)
                keep_alive.append(zero)
                return tensor + zero

            if isinstance(output, Tensor):
                return marked(None, output)
            maps = trace.maps(path)
            new = {id(output[i]): marked(i, output[i]) for i in maps}
            return type(output)(new.get(id(item), item) for item in output)

        return add

    with _dry(backbone, trace.image, hook) as run, torch.enable_grad():
        nodes = [t.grad_fn for t in _flatten(run()) if t.grad_fn is not None]
    found, seen = set(), set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, 'variable', None)
        if leaf is not None and id(leaf) in zeros:
            found.add(zeros[id(leaf)])
        nodes += [n for n, _ in node.next_functions if n is not None]
    return found


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
    """A module on the way through the backbone, and the features it returned, by output index."""
    path: str
    maps: dict[int | None, Layout]
    order: int
    is_block: bool

    @property
    def levels(self) -> tuple[tuple[float, int], ...]:
        """Stride and channels of each feature: what tells one stage from the next."""
        return tuple((layout.stride, layout.channels) for layout in self.maps.values())


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


def _is_wrapper(path: str, module: nn.Module, trace: _Trace) -> bool:
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


def _units(module: nn.Module, path: str, trace: _Trace) -> Iterator[_Unit]:
    for name, child in module.named_children():
        inner = f'{path}.{name}' if path else name
        maps = trace.maps(inner)
        if inner not in trace.calls or isinstance(child, (nn.Sequential, nn.ModuleList)):
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


def _blocks(module: nn.Module, path: str, trace: _Trace) -> list[_Unit]:
    """The blocks inside a module, in the order in which they run."""
    return sorted((u for u in _units(module, path, trace) if u.is_block), key=lambda u: u.order)


def _outermost(path: str, trace: _Trace) -> str:
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
                children = _names(n for n, _ in backbone.named_children())
                raise StageError(f'stages: {type(backbone).__name__} has no module {path!r}; '
                                 f'its children are {children}')
        if not stages:
            raise StageError('stages is an empty list; prompt=None is the way to have no prompts')
    trace = dry_run(backbone)
    remarks: list[str] = []
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
    read = _read(backbone, trace, found)
    result: list[Stage] = []
    number = 0
    for path in sorted(found, key=lambda p: trace.calls[p].order):
        maps = {i: layout for i, layout in found[path].items() if (path, i) in read}
        for index, layout in found[path].items():
            if index not in maps:
                which = path if index is None else f'{path}[{index}]'
                remarks.append(f'{which} ({layout.channels} channels) gets no prompt: no output of '
                               f'{type(backbone).__name__} depends on it')
        number += bool(maps)
        for index, layout in maps.items():
            name = f'stage{number}' if len(maps) == 1 else f'stage{number}_{index}'
            result.append(Stage(name, path, index, layout))
    if not result:
        raise StageError(f'stages: no output of {type(backbone).__name__} depends on any stage '
                         f'that was found: {_names(found)}')
    return result, remarks


def _auto(backbone: nn.Module, trace: _Trace) -> dict[str, dict[int | None, Layout]]:
    blocks = _blocks(backbone, '', trace)
    while len(blocks) == 1:  # one module around everything, as timm's models in their wrappers
        inside = _blocks(backbone.get_submodule(blocks[0].path), blocks[0].path, trace)
        if len(inside) < 2 or not _stack_strides(
                blocks[0].path, backbone.get_submodule(blocks[0].path), trace):
            break
        blocks = inside
    if not blocks:
        raise StageError(
            f'stages: no stage was found in {type(backbone).__name__}; name them with '
            f'stages=[…]; modules that return feature maps: {_names(_candidates(trace))}')
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


def _candidates(trace: _Trace) -> list[str]:
    return sorted((p for p in trace.calls if trace.maps(p)), key=lambda p: (p.count('.'), p))


def _names(names, most: int = 12) -> str:
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'none') + more
