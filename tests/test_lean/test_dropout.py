"""Prompt blocks with dropout, run again in the backward pass."""
import pytest
import torch

from tests.test_lean.blocks import forms, gradients, images, of_type, ordinary


@pytest.mark.parametrize('name', ['Drops', 'DropsAbove'])
@forms
def test_dropout_drops_the_same_again(name, lean):
    """And the backward pass leaves the generator as it was, and the mode of the forward counts."""
    model = of_type(name, lean=lean)
    assert model.prompts['stage1'].drop.training
    x = images(dtype=torch.float64)
    exact = gradients(ordinary(model), x)[1]
    for mode in (True, False):
        model.train().zero_grad()
        torch.manual_seed(4)
        loss = sum((o.sin() * (i + 1)).sum() for i, o in enumerate(model(x)))
        model.train(mode)
        torch.manual_seed(5)  # so that nothing else makes the draws the same
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        for n, p in model.named_parameters():
            if p.requires_grad:
                assert exact[n].norm() > 0 and (p.grad - exact[n]).norm() <= 1e-9 * exact[n].norm()
    torch.manual_seed(6)
    others = [o.detach() for o in model.train()(x)]
    assert not torch.allclose(others[0], model(x)[0])  # it does drop


def test_a_block_without_dropout_touches_no_generator(monkeypatch):
    model = of_type('ActiveDown')
    for name in ('get_rng_state', 'set_rng_state'):
        monkeypatch.setattr(torch, name, lambda *args: pytest.fail('was called'))
    sum(o.sum() for o in model(images(dtype=torch.float64))).backward()
