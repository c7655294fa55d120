
import torch

from mmprotune.lean import functional as lean
from tests.test_lean.functions import draw, kept


def test_unfold_and_norm_keep_the_map():
    x = draw(2, 3, 6, 4).requires_grad_()

    def function(x):
        patches = lean.unfold(x, 3, padding=1, stride=1)
        return lean.layer_norm(patches.transpose(1, 2), (27, ))

    assert torch.autograd.gradcheck(function, x)
    assert kept(function, x) == x.nbytes + 2 * 2 * 24 * 8
