import pytest
import torch


@pytest.fixture
def file(resnet18_file, tmp_path):
    """A pre-trained file of the test's own, which does not fill everything."""
    weights = torch.load(resnet18_file)
    del weights['bn1.weight'], weights['bn1.bias']
    torch.save(weights, tmp_path / 'pretrained.pth')
    return tmp_path / 'pretrained.pth'
