"""What processes exchange: counted, timed, and worked out for more of them."""
import json

import pytest

from mmprotune.errors import LaunchError

from .conftest import REPO, load_tool

benchmark = load_tool('analysis_tools/benchmark_reducing.py')

CONFIG = str(REPO / 'configs/linear_r18_full_cifar10.py')


def test_two_processes(tmp_path, capsys):
    out = tmp_path / 'out.json'
    benchmark.main([CONFIG, '--methods', 'full', 'head', 'stages', 'lora', '--size', '32',
                    '--processes', '2', '--steps', '1', '--json', str(out)])
    report = json.loads(out.read_text())
    found = report['methods']
    assert list(found) == ['full', 'head', 'stages'] and list(report['refused']) == ['lora']
    full, head, stages = found.values()
    for f in (full, head, stages):
        # Every gradient is reduced, and nothing else.
        assert f['reduced'] == f['gradients'] == 4 * f['parameters'] and f['buckets'] >= 1
        assert f['reducing'] > 0 and f['without'] > 0 and f['alone'] > 0 and f['step'] > 0
        assert 0 <= f['optimizer'] - 2 * f['reduced'] < 4096
    assert head['reduced'] == 4 * (512 * 10 + 10)
    assert head['reduced'] < stages['reduced'] < 0.1 * full['reduced']
    assert stages['checkpoint'] < stages['reduced'] + 4096 and full['checkpoint'] > full['reduced']
    assert full['buckets'] > 1
    text = capsys.readouterr().out
    assert 'left out: lora: adapts linear layers' in text and 'stages' in text


def test_a_ring():
    """Two processes send each byte once; many, twice."""
    assert benchmark.ring_seconds(1000, 2, 100) == 10
    assert benchmark.ring_seconds(1000, 1, 100) == 0
    assert benchmark.ring_seconds(1000, 512, 100) == pytest.approx(20, rel=0.01)


def test_a_share():
    found = benchmark.shares(dict(reducing=[(3., 2.), (4., 4.), (9., 5.)],
                                  without=[(1., 1.), (1., 3.), (1., 9.)], alone=[(1., 0.5)] * 3))
    assert found == dict(reducing=4., without=3., alone=0.5, step=4., share=0.25)


@pytest.mark.parametrize('option', [['--processes', '0'], ['--steps', '-1'], ['--size', '8']])
def test_bad_numbers(option, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args([CONFIG, *option])
    assert f'{option[0]} must be at least' in capsys.readouterr().err


@pytest.mark.parametrize('method, message', [
    ('nosuch', "no method 'nosuch'; known are adaptformer"),
    ('lora', 'none fits: lora: adapts linear layers')])
def test_methods_that_there_are_none_of(method, message):
    with pytest.raises(LaunchError, match=message):
        benchmark.main([CONFIG, '--methods', method, '--size', '32'])
