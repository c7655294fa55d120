
import torch

from mmprotune.lean.functional.bits import pack_bits, pack_bits_anywhere
from tests.test_lean.functions import draw


def test_bits_are_the_same_on_any_device():
    for n in (1, 7, 8, 9, 1000):
        mask = draw(n) > 0
        assert torch.equal(pack_bits(mask), pack_bits_anywhere(mask))
