from torch import nn

from mmprotune.lean.dry_run import IMAGE_SIZES, image_shapes


class Sized(nn.Module):

    def __init__(self, size):
        super().__init__()
        self.img_size = size


def test_the_size_that_a_network_was_built_for_comes_first_unless_it_is_slow():
    def sizes(network):
        shapes = image_shapes(network)
        assert [c for c, *_ in shapes] == [3] * (len(shapes) // 2) + [1] * (len(shapes) // 2)
        return [tuple(size) for _, *size in shapes[:len(shapes) // 2]]

    assert sizes(nn.Identity()) == list(IMAGE_SIZES)
    assert sizes(Sized(56)) == [(56, 56), *IMAGE_SIZES]
    assert sizes(Sized((384, 320))) == [(384, 320), *IMAGE_SIZES]
    # SETR's ViT-L took more than a minute for one run.
    assert sizes(Sized((768, 768))) == [*IMAGE_SIZES, (768, 768)]
    assert sizes(nn.Sequential(Sized(518))) == [*IMAGE_SIZES, (518, 518)]
