"""The command line of the matrix of backbones."""
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


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        matrix.main(['--only', 'no such backbone'])
    assert 'matches none' in capsys.readouterr().err


def test_a_process_that_dies_is_a_failure(monkeypatch):
    monkeypatch.setattr(matrix, '__file__', '/dev/null')
    result = matrix._check_in_a_process('mmdet.ResNet', 60)
    assert result['verdict'] == 'fail' and 'the process ended with 0' in result['reason']
    assert json.dumps(result)
