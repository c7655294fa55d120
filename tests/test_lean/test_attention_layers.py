

from tests.test_lean.networks import SMALL, distance, images, kept_by, outputs_of, prompted


def test_attention_may_use_the_fused_kernel_or_stay_as_it_is():
    x = images(1, 3, 96, 64)
    exact, fused, stock = (prompted(SMALL['vit'], lean=dict(attention=a))
                           for a in ('exact', 'sdpa', False))
    assert distance(outputs_of(fused, x), outputs_of(exact, x)) < 1e-5
    assert distance(outputs_of(stock, x), outputs_of(exact, x)) == 0
    assert sum(kept_by(stock, x).values()) > sum(kept_by(exact, x).values())
