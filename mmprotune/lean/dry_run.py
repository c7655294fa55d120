"""Running a network on noise without leaving a trace in it."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

# Image sizes (H, W) tried in turn, small ones first: not square, which tells height from width.
IMAGE_SIZES = ((64, 96), (128, 192), (224, 224), (256, 256), (384, 384), (512, 512))
# Channels tried in turn.
IMAGE_CHANNELS = (3, 1)


def image_shapes(network: nn.Module) -> list[tuple[int, int, int]]:
    """Shapes (C, H, W) to try: usual sizes, then those that the network and its parts say they were
    built for; in colour first.

    Args:
        network (nn.Module): Takes images of shape (N, C, H, W).
    """
    sizes = dict.fromkeys((*IMAGE_SIZES, *own_sizes(network)))
    return [(channels, *size) for channels in IMAGE_CHANNELS for size in sizes]


def own_sizes(network: nn.Module) -> list[tuple[int, int]]:
    """Image sizes (H, W) that a network and its parts say they were built for."""
    found = []
    for module in network.modules():
        size = getattr(module, 'img_size', None) or getattr(module, 'image_size', None)
        if size is not None:
            found.append((size, size) if isinstance(size, int) else tuple(size)[-2:])
    return list(dict.fromkeys(found))


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
        shape (tuple[int, int, int], optional): An image shape (C, H, W) at which the network is
            known to run. Defaults to None.

    Attributes:
        shape (tuple[int, int, int], optional): The image shape at which the network runs; None
            before :meth:`start`, and where it runs at none.
        error (str, optional): Why it did not run at the first shape tried.
    """

    def __init__(self, root: nn.Module, network: nn.Module,
                 shape: tuple[int, int, int] | None = None) -> None:
        self.root = root
        self.error: str | None = None
        # Of the images, also once weights are stored in another precision.
        self._dtype = noise(root, (1, 1, 1), 1).dtype
        self._trains = any(p.requires_grad for p in root.parameters())
        self._shapes = image_shapes(network)
        if shape is not None:
            # Not the smallest, if it can be: on small images padding distorts what layers cost.
            self._shapes = [(shape[0], *IMAGE_SIZES[1]), shape]
        else:
            self._shapes[:2] = self._shapes[1::-1]
        self.shape: tuple[int, int, int] | None = None

    def start(self, run: Callable[[], list[Tensor] | None] | None = None) -> list[Tensor] | None:
        """Runs the network at the first shape that it accepts; once that is known, at this one.

        Args:
            run (Callable, optional): A try: calls this object, and returns what that does. Defaults
                to None: without a graph.

        Returns:
            list[Tensor], optional: The outputs; None where it runs at none.
        """
        for shape in self._shapes if self.shape is None else [self.shape]:
            self.shape = shape
            outputs = self(graph=False) if run is None else run()
            if outputs is not None:
                return outputs
        self.shape = None
        return None

    def __call__(self, graph: bool = True) -> list[Tensor] | None:
        """Runs the network once, on the same image as ever.

        Args:
            graph (bool): Whether in an autograd graph. The image requires a gradient only where
                nothing trains. Defaults to True.

        Returns:
            list[Tensor], optional: The outputs; None where the network does not run.
        """
        # Leaving inference mode switches gradients on, so that they are set last.
        with undisturbed(self.root), torch.inference_mode(False), torch.set_grad_enabled(graph):
            images = noise(self.root, self.shape, 1).to(self._dtype)
            try:
                images = images.requires_grad_(graph and not self._trains).clone()
                return list(tensors_in(self.root(images)))
            except Exception as error:  # whatever it is: not at this size
                self.error = self.error or f'{type(error).__name__}: {error}'
        return None
