"""Pro-tuning on the registered backbones: one of each family here, all of them under -m matrix."""
import pytest

from mmprotune import PromptBlock
from mmprotune.lean import functional
from mmprotune.matrix.backbone_checks import check
from mmprotune.matrix.backbones import backbones

FAMILIES = [
    'mmdet.ResNet', 'mmdet.SwinTransformer', 'mmdet.HRNet', 'mmdet.CSPNeXt',
    'mmdet.PyramidVisionTransformerV2', 'mmseg.MixVisionTransformer', 'mmseg.MobileNetV2',
    'mmseg.BiSeNetV1', 'mmseg.MSCAN', 'mmpretrain.VisionTransformer', 'mmpretrain.ConvNeXt',
    'mmpretrain.RegNet', 'mmpretrain.EfficientNet', 'mmpretrain.MobileOne',
    'mmpretrain.TIMMBackbone',
]


@pytest.mark.parametrize('name', FAMILIES)
def test_one_of_each_family(name):
    result = check(name)
    assert result['verdict'] == 'pass', result.get('traceback', result['reason'])
    assert result['prompt_parameters'] > 0 and len(result['stages']) > 1


@pytest.mark.matrix
@pytest.mark.parametrize('name', sorted(backbones()))
def test_every_backbone(name):
    result = check(name)
    if result['verdict'] == 'host':
        pytest.skip(result['reason'])
    assert result['verdict'] == 'pass', result.get('traceback', result['reason'])


def test_a_broken_promise_fails(monkeypatch):
    """The check can fail: a prompt that does not start at zero, a buffer that moves."""
    monkeypatch.setattr(PromptBlock, 'reset_parameters', lambda self: None)
    result = check('mmdet.ResNet')
    assert result['verdict'] == 'fail'
    assert 'not equal to the frozen backbone at the start' in result['reason']


def test_a_wrong_gradient_fails(monkeypatch):
    convolve = functional.Convolution.input_gradient
    monkeypatch.setattr(functional.Convolution, 'input_gradient',
                        lambda self, *args: convolve(self, *args) * 1.001)
    result = check('mmdet.ResNet')
    assert result['verdict'] == 'fail' and 'gradients of lean layers are off' in result['reason']
