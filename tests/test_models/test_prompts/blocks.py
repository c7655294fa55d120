"""What the tests of all blocks share: loops over pixels in place of convolutions, the lean form."""
from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mmprotune.lean.memory import KeptBytes
from tests.conftest import RESNET18, build

PIXELS = 2 * sum((16 // 2**i)**2 for i in range(4))  # of the features of two images of 64x64
CHANNELS = (8, 16, 32, 64)


def drawn(block: nn.Module, seed: int = 0) -> nn.Module:
    """The block in double precision, every parameter drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in block.double().parameters():
            p.normal_(std=0.5, generator=generator)
    return block


def feature(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def convolved(x: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """A convolution with zeros around the map, one output at a time."""
    weight, bias = array(conv.weight), array(conv.bias)
    outputs, per_group, size, _ = weight.shape
    n, channels, height, width = x.shape
    margin = size // 2
    padded = np.zeros((n, channels, height + 2 * margin, width + 2 * margin))
    padded[:, :, margin:margin + height, margin:margin + width] = x
    y = np.zeros((n, outputs, height, width))
    for o in range(outputs):
        first = o // (outputs // (channels // per_group)) * per_group
        for i in range(height):
            for j in range(width):
                window = padded[:, first:first + per_group, i:i + size, j:j + size]
                y[:, o, i, j] = (window * weight[o]).sum(axis=(1, 2, 3)) + bias[o]
    return y


def gelu(x: np.ndarray) -> np.ndarray:
    erf = array(torch.erf(torch.from_numpy(x / 2**0.5)))
    return 0.5 * x * (1 + erf)


def check_start(block: nn.Module) -> None:
    """The prompt of a new block is zero, and the second step reaches every parameter."""
    x = feature(2, block.channels, 6, 5).float()
    prompt = block(x)
    assert prompt.shape == x.shape and torch.equal(prompt, torch.zeros_like(x))
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        torch.manual_seed(0)
        (block(x) * x.sin()).sum().backward()
        optimizer.step()
    for name, p in block.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def check_lean(prompt: dict) -> tuple[int, int]:
    """In a backbone, the lean form has the gradients of the ordinary one.

    Returns:
        tuple[int, int]: Bytes that its prompts keep in double precision, and those of the ordinary
        ones.
    """
    images = feature(2, 3, 64, 64)
    kept, found = [], []
    for prompts in ('output', False):
        m = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET18, freeze='all',
                       prompt=prompt, lean=dict(prompts=prompts))).train().double()
        drawn(m.prompts)
        torch.manual_seed(4)
        with KeptBytes(m) as count:
            outputs = m(images)
        kept.append(sum(n for path, n in count.by_module().items() if path.startswith('prompts')))
        sum((o.sin() * (i + 1)).sum() for i, o in enumerate(outputs)).backward()
        found.append([o.detach() for o in outputs] + [p.grad for p in m.prompts.parameters()])
    for a, b in zip(*found):
        assert b.norm() > 0 and (a - b).norm() <= 1e-8 * b.norm()
    return tuple(kept)
