"""The weights of the stock model."""
import torch

from mmprotune.matrix.configs import runs_of
from mmprotune.matrix.stock import _forget_few_values, check_stock, stock_model
from tests.test_matrix.conftest import SMALL


def test_norms_fit_the_weights_and_constants_move(tmp_path):
    run, = runs_of([SMALL])
    drawn = stock_model(run)[0].backbone.state_dict()
    result = check_stock(run, tmp_path)
    assert result == dict(size=128, larger=[320, 512], finite=True)
    weights = torch.load(tmp_path / 'backbone.pth')
    assert all(not torch.equal(weights[k], v) for k, v in drawn.items()
               if k.endswith(('weight', 'bias')))
    means = {k: v for k, v in weights.items() if k.endswith('running_mean')}
    assert means and all(v.any() for v in means.values())


def test_statistics_of_a_few_values_are_not_taken():
    norms = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    for norm, side in zip(norms, (2, 3)):
        norm.register_forward_hook(_forget_few_values)
        norm(torch.rand(2, 3, side, side))
    assert not norms[0].running_mean.any() and norms[1].running_mean.all()
