"""Running a network on noise without leaving a trace in it."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .graph import run_folded

# Image sizes (H, W) tried in turn: not square first, which tells height from width.
IMAGE_SIZES = ((64, 96), (128, 192), (224, 224), (256, 256), (384, 384))
# Channels tried in turn.
IMAGE_CHANNELS = (3, 1)
# Work is compared at a usual size: on small images, padding distorts it.
USUAL_SIZE = (224, 224)


def image_shapes(network: nn.Module) -> list[tuple[int, int, int]]:
    """Shapes (C, H, W) to try: the size that the network says it was built for, usual ones, then
    those that its parts name (timm's patch embeddings); in colour first. Sizes that are larger than
    all usual ones come last: at 768 px, a ViT-L takes a minute for one run on a CPU.

    Args:
        network (nn.Module): Takes images of shape (N, C, H, W).
    """
    sizes = list(IMAGE_SIZES)
    for module in network.modules():
        fixed = getattr(module, 'img_size', None) or getattr(module, 'image_size', None)
        if fixed is None:
            continue
        fixed = (fixed, fixed) if isinstance(fixed, int) else tuple(fixed)[-2:]
        if module is network and max(fixed) <= max(map(max, IMAGE_SIZES)):
            sizes.insert(0, fixed)
        elif fixed not in sizes:
            sizes.append(fixed)
    return [(channels, *size) for channels in IMAGE_CHANNELS for size in sizes]


def noise(network: nn.Module, shape: tuple[int, int, int], batch: int) -> Tensor:
    """Always the same noise of shape (batch, C, H, W), where and as the network's weights are.

    Args:
        network (nn.Module): Takes it.
        shape (tuple[int, int, int]): Channels, height and width.
        batch (int): How many.
    """
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, *shape, generator=generator).to(like.device, like.dtype)


@contextlib.contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """While open, the network is in eval mode; afterwards its modes, and the state of the random
    generator, are what they were.

    Args:
        network (nn.Module): The network.
    """
    modes = {m: m.training for m in network.modules()}
    try:
        network.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def nothing_saved() -> contextlib.AbstractContextManager:
    """While open, autograd keeps no tensors: for a graph that is looked at and never run back."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing)


def tensors_in(output) -> Iterator[Tensor]:
    """The tensors in what a network returns, however it nests them.

    Args:
        output: A tensor, or tuples, lists and dicts of them.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_in(item)
    elif isinstance(output, Mapping):
        yield from tensors_in(list(output.values()))


class DryRun:
    """Runs a network on a small noise image without touching its state.

    Args:
        root (nn.Module): What takes images and runs the network.
        network (nn.Module): The network.

    Attributes:
        shape (tuple[int, int, int], optional): The first image shape (C, H, W) at which the network
            runs; None where it runs at none.
        error (str, optional): Why it did not run at the first shape tried.
    """

    def __init__(self, root: nn.Module, network: nn.Module) -> None:
        self.root = root
        self.error: str | None = None
        # Of the images, also once weights are stored in another precision.
        self._dtype = noise(root, (1, 1, 1), 1).dtype
        self._trains = any(p.requires_grad for p in root.parameters())
        self.shape: tuple[int, int, int] | None = None
        for shape in image_shapes(network):
            self.shape = shape
            if self() is not None:
                return
        self.shape = None

    def __call__(self, through: bool = False,
                 size: tuple[int, int] | None = None) -> list[Tensor] | None:
        """Runs the network once, in a graph.

        Args:
            through (bool): Whether the image requires a gradient, so that the graph goes through
                all layers. Otherwise only where nothing trains. Defaults to False.
            size (tuple[int, int], optional): Of the image. Defaults to None: that of ``shape``.

        Returns:
            list[Tensor], optional: The outputs; None where the network does not run.
        """
        return self._run(1, size, through or not self._trains)

    def infer(self) -> list[Tensor] | None:
        """Runs the network once, on two images of a usual size and without a graph.

        Returns:
            list[Tensor], optional: The outputs; None where the network does not run.
        """
        outputs = self._run(2, USUAL_SIZE, None)
        return self._run(2, None, None) if outputs is None else outputs

    def _run(self, batch: int, size: tuple[int, int] | None,
             through: bool | None) -> list[Tensor] | None:
        """``through`` is None for no graph."""
        # Leaving inference mode switches gradients on, so that they are set last.
        with undisturbed(self.root), torch.inference_mode(False), torch.set_grad_enabled(
                through is not None):
            shape = self.shape if size is None else (self.shape[0], *size)
            images = noise(self.root, shape, batch).to(self._dtype)
            try:
                images = images.requires_grad_(bool(through))
                return list(tensors_in(run_folded(self.root, images)))
            except Exception as error:  # whatever it is: not at this size
                self.error = self.error or f'{type(error).__name__}: {error}'
        return None
