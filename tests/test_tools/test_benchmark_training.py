"""The benchmark of training steps: what it counts, for which part, and what it writes."""
import importlib.util
import json
import sys

import pytest
import torch

from mmprotune.lean import onednn
from tests.test_tools.conftest import REPO

spec = importlib.util.spec_from_file_location(
    'benchmark_training', REPO / 'tools/analysis_tools/benchmark_training.py')
benchmark = importlib.util.module_from_spec(spec)
sys.modules['benchmark_training'] = benchmark
spec.loader.exec_module(benchmark)

CONFIG = str(REPO / 'configs/mask_rcnn_r18_protune_shapes.py')
SMALL = ['--size', '128', '--batch-size', '1', '--device', 'cpu']


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp('benchmark')
    benchmark.main([CONFIG, *SMALL, '--steps', '2', '--json', str(folder / 'out.json'),
                    '--plot', str(folder / 'out.png')])
    return folder


def test_figures(measured):
    report = json.loads((measured / 'out.json').read_text())
    assert report['about']['size'] == 128 and report['about']['device'].endswith('CPU')
    found = report['results'][0]['variants']
    assert list(found) == ['full', 'frozen', 'naive', 'lean']
    for figures in found.values():
        assert figures['kept_total'] == sum(figures['kept'].values()) > 0
        assert figures['kept']['head'] > 0 and figures['kept']['neck'] > 0
        assert 0 < figures['fastest'] <= figures['step'] <= figures['slowest']
        assert 0 < figures['inference_fastest'] <= figures['inference']
        # AdamW: two moments for each gradient, and a counter for each tensor.
        assert 0 < figures['optimizer_state'] - 2 * figures['gradients'] < 4096
    # Prompts lie in the branches; parts are counted by stages all the same.
    full, frozen, naive, lean = (
        sum(n for part, n in f['kept'].items() if part.startswith('stage'))
        for f in found.values())
    assert frozen == 0 and 0 < lean < 0.1 * naive and lean < 0.1 * full
    assert 'prompts' not in found['frozen']['kept'] and found['lean']['kept']['prompts'] > 0
    assert found['lean']['kept_total'] < found['naive']['kept_total']
    assert found['lean']['gradients'] == found['naive']['gradients'] < found['full']['gradients']
    assert (measured / 'out.png').read_bytes().startswith(b'\x89PNG')


def test_allocated(measured):
    found = json.loads((measured / 'out.json').read_text())['results'][0]['variants']
    if found['lean']['allocated'] is None:
        pytest.skip(f"torch {torch.__version__}: the profiler's events have no start_ns")
    assert all(f['allocated'] > f['gradients'] for f in found.values())
    assert found['lean']['allocated'] <= found['naive']['allocated']


def test_a_block_without_convolutions(capsys):
    benchmark.main([CONFIG, *SMALL, '--backbone-only', '--steps', '0', '--variants', 'lean',
                    '--cfg-options', 'model.backbone.prompt.type=mmprotune.AffinePrompt'])
    assert 'prompted, lean' in capsys.readouterr().out


def test_a_stock_config_and_a_peer(capsys):
    benchmark.main(['mmpretrain::vision_transformer/vit-base-p16_32xb128-mae_in1k.py', *SMALL,
                    '--backbone-only', '--steps', '0', '--variants', 'frozen', 'lean', 'lora',
                    '--cfg-options', 'model.backbone.backbone.arch=deit-tiny',
                    'model.backbone.backbone.img_size=128',
                    'model.backbone.backbone.drop_path_rate=0'])
    out = capsys.readouterr().out
    rows = {line.split('  ')[0]: line.split() for line in out.splitlines()}
    assert float(rows['head only'][2]) == 0
    assert 'LoRA' in rows and float(rows['LoRA'][1]) > 0


def test_no_peer_without_linear_layers(capsys):
    benchmark.main([CONFIG, *SMALL, '--backbone-only', '--steps', '0', '--variants', 'lora'])
    captured = capsys.readouterr()
    assert 'no linear layers' in captured.out + captured.err


@pytest.mark.parametrize('option', [['--size', '0'], ['--batch-size', '0'], ['--steps', '-1']])
def test_bad_numbers(option, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args([CONFIG, *option])
    assert f'{option[0]} must be at least' in capsys.readouterr().err


def test_an_ablation_takes_one_part_out_at_a_time(tmp_path, monkeypatch):
    calls, own = [], onednn.product
    monkeypatch.setattr(onednn, 'product', lambda *a: (calls.append(1), own(*a))[1])
    benchmark.main([str(REPO / 'configs/mask_rcnn_swin-t_protune_coco.py'), *SMALL, '--ablate',
                    '--variants', 'lean', '--backbone-only', '--steps', '1', '--json',
                    str(tmp_path / 'out.json')])
    found = json.loads((tmp_path / 'out.json').read_text())['results'][0]['variants']
    assert list(found) == ['lean', 'without product']
    assert all(f['step'] > 0 and f['inference'] > 0 for f in found.values())
    assert len({f['kept_total'] for f in found.values()}) == 1 and calls


def test_compiled_variants(tmp_path, capsys):
    out = tmp_path / 'out.json'
    benchmark.main([CONFIG, *SMALL, '--backbone-only', '--steps', '1', '--no-inference',
                    '--variants', 'compiled', '--compile', 'backend=eager', '--json', str(out)])
    figures = json.loads(out.read_text())['results'][0]['variants']['compiled']
    assert figures['kept'] == dict(compiled=figures['kept_total']) and figures['kept_total'] > 0
    assert figures['step'] > 0 and 'inference' not in figures
    assert 'lean, compiled' in capsys.readouterr().out


def test_what_the_hosts_have_themselves(tmp_path, capsys):
    out = tmp_path / 'out.json'
    benchmark.main([CONFIG, *SMALL, '--backbone-only', '--steps', '0', '--json', str(out),
                    '--variants', 'full', 'naive', *benchmark.HOSTS])
    found = json.loads(out.read_text())['results'][0]['variants']
    assert list(found) == ['full', 'naive', *benchmark.HOSTS]
    kept = {name: figures['kept_total'] for name, figures in found.items()}
    assert kept['with_cp'] < 0.8 * kept['full']
    assert kept['naive_with_cp'] < 0.8 * kept['naive']
    # It keeps each weight multiplied by its norm's, which on small images outweighs the features.
    weights = found['full']['gradients']
    assert found['efficient_conv_bn_eval']['gradients'] == weights
    assert 0 < kept['efficient_conv_bn_eval'] - 0.98 * weights < kept['full']
    assert 'lean of' not in capsys.readouterr().out


def test_what_a_host_lacks_is_told(capsys):
    benchmark.main(['mmpretrain::vision_transformer/vit-base-p16_32xb128-mae_in1k.py', *SMALL,
                    '--backbone-only', '--steps', '0', '--variants', 'lean', *benchmark.HOSTS,
                    '--cfg-options', 'model.backbone.backbone.arch=deit-tiny',
                    'model.backbone.backbone.img_size=128'])
    out = capsys.readouterr().out
    assert 'no with_cp, so no full, with_cp' in out and 'no with_cp, so no naive, with_cp' in out
    assert 'no BatchNorm that stands still, so no full, conv_bn_eval' in out
