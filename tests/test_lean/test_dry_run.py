import torch
from torch import nn

from mmprotune.lean.dry_run import IMAGE_SIZES, DryRun, image_shapes


class Sized(nn.Module):

    def __init__(self, size):
        super().__init__()
        self.img_size = size


def test_small_sizes_come_before_those_that_a_network_was_built_for():
    def sizes(network):
        shapes = image_shapes(network)
        assert [c for c, *_ in shapes] == [3] * (len(shapes) // 2) + [1] * (len(shapes) // 2)
        return [tuple(size) for _, *size in shapes[:len(shapes) // 2]]

    assert sizes(nn.Identity()) == list(IMAGE_SIZES)
    assert sizes(Sized(56)) == [*IMAGE_SIZES, (56, 56)]
    # SETR's ViT-L took more than a minute for one run.
    assert sizes(Sized((768, 512))) == [*IMAGE_SIZES, (768, 512)]
    assert sizes(nn.Sequential(Sized(518), Sized(224))) == [*IMAGE_SIZES, (518, 518)]


class Picky(nn.Module):
    """Runs at one size only, and begins to run at any."""

    def __init__(self, height):
        super().__init__()
        self.height, self.conv, self.tries = height, nn.Conv2d(3, 4, 3), []

    def forward(self, x):
        y = self.conv(x)
        self.tries.append(tuple(x.shape[2:]))
        if x.size(2) != self.height:
            raise ValueError(f'not at {x.size(2)}')
        return y


def test_a_dry_run_starts_at_a_size_that_is_known():
    net = Picky(64)
    dry_run = DryRun(net, net, (3, 64, 96))
    tries = []
    outputs = dry_run.start(lambda: tries.append(1) or dry_run())
    assert dry_run.shape == (3, 64, 96) and len(tries) == 2
    assert net.tries == [(128, 192), (64, 96)] and dry_run.error == 'ValueError: not at 128'
    assert outputs[0].shape == (1, 4, 62, 94) and outputs[0].requires_grad
    again, = dry_run.start()
    assert net.tries[2:] == [(64, 96)] and not again.requires_grad
    assert torch.equal(again, outputs[0])
    assert DryRun(net, net).start() is not None
    never = DryRun(Picky(7), Picky(7))
    assert never.start() is None and never.shape is None and never.error
