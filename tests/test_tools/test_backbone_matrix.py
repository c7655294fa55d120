"""Pro-tuning on the registered backbones: one of each family here, all of them under -m matrix."""
import importlib.util
import json
import sys

import pytest

from tests.test_tools.conftest import REPO

spec = importlib.util.spec_from_file_location(
    'backbone_matrix', REPO / 'tools/analysis_tools/backbone_matrix.py')
matrix = importlib.util.module_from_spec(spec)
sys.modules['backbone_matrix'] = matrix
spec.loader.exec_module(matrix)

FAMILIES = [
    'mmdet.ResNet', 'mmdet.SwinTransformer', 'mmdet.HRNet', 'mmdet.CSPNeXt',
    'mmdet.PyramidVisionTransformerV2', 'mmseg.MixVisionTransformer', 'mmseg.MobileNetV2',
    'mmseg.BiSeNetV1', 'mmseg.MSCAN', 'mmpretrain.VisionTransformer', 'mmpretrain.ConvNeXt',
    'mmpretrain.RegNet', 'mmpretrain.EfficientNet', 'mmpretrain.MobileOne',
    'mmpretrain.TIMMBackbone',
]


@pytest.mark.parametrize('name', FAMILIES)
def test_one_of_each_family(name):
    result = matrix.check(name)
    assert result['verdict'] == 'pass', result.get('traceback', result['reason'])
    assert result['prompt_parameters'] > 0 and len(result['stages']) > 1


@pytest.mark.matrix
@pytest.mark.parametrize('name', sorted(matrix.backbones()))
def test_every_backbone(name):
    result = matrix.check(name)
    if result['verdict'] == 'host':
        pytest.skip(result['reason'])
    assert result['verdict'] == 'pass', result.get('traceback', result['reason'])


def test_a_broken_promise_fails(monkeypatch):
    """The check can fail: a prompt that does not start at zero, a buffer that moves."""
    from mmprotune import PromptBlock
    monkeypatch.setattr(PromptBlock, 'reset_parameters', lambda self: None)
    result = matrix.check('mmdet.ResNet')
    assert result['verdict'] == 'fail'
    assert 'not equal to the frozen backbone at the start' in result['reason']


def test_a_wrong_gradient_fails(monkeypatch):
    from mmprotune.lean import functional
    convolve = functional.Convolution.input_gradient
    monkeypatch.setattr(functional.Convolution, 'input_gradient',
                        lambda self, *args: convolve(self, *args) * 1.001)
    result = matrix.check('mmdet.ResNet')
    assert result['verdict'] == 'fail' and 'gradients of lean layers are off' in result['reason']


def test_the_table(tmp_path, capsys):
    results = [
        dict(name='a.B', verdict='pass', reason='', arguments=dict(arch='s'), parameters=100,
             prompt_parameters=10, lean_bytes=1, naive_bytes=4,
             stages=[dict(path='x', index=1, channels=8)],
             places=dict(blocks=3, branches=None, narrow=None, outputs=1)),
        dict(name='a.C', verdict='host', reason='wants | more'),
        dict(name='a.D', verdict='fail', reason='AssertionError: no')
    ]
    text = matrix.markdown(results, 'make')
    assert '1 of the 2 backbone classes' in text and '(3 are registered)' in text
    assert '| a.B | arch=s | x[1] | 8 | 10 | 10.0% | 25% | 3 | – | – | 1 | pass |' in text
    assert '| a.C |  |  |  |  |  |  |  |  |  |  | host: wants / more |' in text
    with pytest.raises(SystemExit):
        matrix.main(['--only', 'no such backbone'])
    assert 'matches none' in capsys.readouterr().err


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(matrix, '__file__', '/dev/null')
    result = matrix._check_in_a_process('mmdet.ResNet', 60)
    assert result['verdict'] == 'fail' and 'the process ended with 0' in result['reason']
    assert json.dumps(result)
