
import pytest

from tests.test_lean.networks import SMALL, images, kept_by, prompted


@pytest.mark.parametrize('name', ['vit', 'convnext', 'swin'])
def test_recomputation_is_a_choice(name):
    x = images(2, 3, 96, 64)
    counts = [sum(kept_by(prompted(SMALL[name], lean=dict(recompute=share)), x).values())
              for share in (0, 0.1, True)]
    assert counts[0] > counts[1] >= counts[2]
