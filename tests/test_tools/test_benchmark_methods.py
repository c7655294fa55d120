"""Whole comparisons of methods on drawn images; what a cut, a failure and bad input lead to."""
from __future__ import annotations

import fcntl
import json
import multiprocessing.process
import os
import signal
import statistics
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmprotune import checkpoint
from mmprotune.comparison import runs
from mmprotune.comparison.methods import Method
from mmprotune.comparison.plan import Cell, Plan, Results, due, sweep_of
from mmprotune.errors import LaunchError

from ..classification import draw_folder
from .conftest import REPO, load_tool

tool = load_tool('benchmark_methods.py')

CONFIG = """
_base_ = '{configs}/linear_r18_full_cifar10.py'
model = dict(
    backbone=dict(
        _delete_=True, type='mmdet.ResNet', depth=18, base_channels=8, norm_eval=True,
        out_indices=(0, 1, 2, 3), init_cfg=dict(type='Pretrained', checkpoint={weights!r})),
    head=dict(in_channels=64, num_classes=4))
data_preprocessor = dict(num_classes=4)
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(batch_size=16, dataset=dict(data_root={data!r}, pipeline=pipeline))
val_dataloader = dict(dataset=dict(data_root={data!r}, pipeline=pipeline))
test_dataloader = val_dataloader
param_scheduler = []
train_cfg = dict(max_epochs=12)
shifts = dict(_delete_=True)
"""
OWN_NETWORKS = """
from mmdet.models import ResNet
from mmengine.registry import MODELS

@MODELS.register_module()
class OwnResNet(ResNet):
    pass
"""
BROKEN = """
backbone = dict(type='mmprotune.PromptedBackbone', prompt=None)
custom_hooks = [dict(type='NoSuchHook')]
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory, resnet18_file) -> str:
    """Full fine-tuning of a small classifier of drawn colours: 40 images to train on, 16 others."""
    folder = tmp_path_factory.mktemp('methods')
    draw_folder(folder / 'train', (10, 10, 10, 10))
    draw_folder(folder / 'test', (4, 4, 4, 4), seed=1)
    path = folder / 'config.py'
    path.write_text(CONFIG.format(
        configs=REPO / 'configs', weights=resnet18_file, data=str(folder)))
    return str(path)


def run(config: str, out, *args: str, methods=('full', 'stages'), lrs=('1e-3', '1e-2'),
        metric='accuracy/top1') -> dict:
    tool.main([config, '--methods', *methods, '--lrs', *lrs, '--metric', metric,
               '--out', str(out), *args])
    return json.loads((out / 'methods.json').read_text())


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / 'cells.jsonl').read_text().splitlines()]


def key(entry: dict) -> tuple:
    return entry['phase'], entry['method'], entry['lr'], entry['seed']


def scored(monkeypatch, score) -> list[Cell]:
    """Lets cells report ``score(cell)`` instead of training; returns the cells that are begun."""
    def run_cell(cfg, method, cell, split, folder, keep):
        if cell.phase == 'cost':
            return dict(trained_backbone=1, trained=2, kept=3, checkpoint=4)
        return dict(m=score(cell))
    monkeypatch.setattr(runs, 'run_cell', run_cell)  # what is forked has it too
    begun, job = [], runs._Job

    def counted(cell, *args):
        begun.append(cell)
        return job(cell, *args)
    monkeypatch.setattr(runs, '_Job', counted)
    return begun


def test_a_whole_comparison_that_was_cut_off_in_the_middle(config, tmp_path, monkeypatch):
    out, args = tmp_path / 'out', ('--seeds', '0', '1', '--jobs', '2', '--holdout', '0.25')
    add, added = Results.add, []

    def cut(self, cell, result):
        if len(added) == 4:
            raise KeyboardInterrupt
        add(self, cell, result)
        added.append(cell)

    monkeypatch.setattr(Results, 'add', cut)
    with pytest.raises(KeyboardInterrupt):
        run(config, out, *args)
    monkeypatch.undo()
    before = lines(out)
    assert len(before) == 4
    with (out / 'cells.jsonl').open('a') as file:
        file.write('{"phase": "sweep", "meth')  # the power went

    found = run(config, out, *args)
    after = lines(out)
    assert after[:4] == before
    assert len({key(entry) for entry in after}) == len(after)  # nothing ran twice
    assert not any(entry['error'] for entry in after)
    assert {entry['phase'] for entry in after} == {'cost', 'sweep', 'final'}

    by_name = {row['method']: row for row in found['methods']}
    assert list(by_name) == ['full', 'stages']
    for name, row in by_name.items():
        final = [e for e in after if e['phase'] == 'final' and e['method'] == name]
        assert {e['seed'] for e in final} == {0, 1}
        assert {e['lr'] for e in final} == {row['lr']}
        scores = [e['metrics']['accuracy/top1'] for e in final]
        assert row['mean'] == pytest.approx(statistics.mean(scores))
        assert row['sd'] == pytest.approx(statistics.stdev(scores))
        assert row['mean'] >= 40  # of four classes
        sweep = {float(lr): score for lr, score in row['sweep'].items()}
        assert sweep[row['lr']] == max(sweep.values())
        assert f'| {name} | {row["mean"]:.4g} ± {row["sd"]:.2g} | 2 |' in (
            out / 'methods.md').read_text()
    # All of a ResNet-18 of eighth width.
    assert by_name['full']['trained_backbone'] == 176_712
    assert 0 < by_name['stages']['trained_backbone'] < 10_000
    assert by_name['stages']['kept'] < by_name['full']['kept']
    assert by_name['stages']['checkpoint'] < by_name['full']['checkpoint'] / 5
    assert by_name['full']['checkpoint'] > 4 * 176_712
    assert (out / 'methods.png').read_bytes()[:4] == b'\x89PNG'

    (out / 'methods.md').unlink()
    tool.main([config, '--report', '--out', str(out)])
    assert '| stages |' in (out / 'methods.md').read_text()
    assert lines(out) == after


def test_no_image_of_the_test_chooses_a_rate(config, tmp_path):
    run(config, tmp_path, methods=['head'])
    split = json.loads((tmp_path / 'holdout.json').read_text())
    assert sorted(split['train'] + split['held']) == list(range(40))
    assert len(split['held']) == 8
    lr = next(e['lr'] for e in lines(tmp_path) if e['phase'] == 'final')
    configs = {phase: Config.fromfile(next(
        (tmp_path / 'logs' / f'{phase}_head_lr{lr}_seed0').glob('*.py')))
        for phase in ('sweep', 'final')}
    sweep, final = configs['sweep'], configs['final']
    assert sweep.train_dataloader.dataset.indices == split['train']
    assert sweep.val_dataloader.dataset.indices == split['held']
    assert sweep.val_dataloader.dataset.data_prefix == 'train'
    assert 'indices' not in final.train_dataloader.dataset
    assert 'indices' not in final.val_dataloader.dataset
    assert final.val_dataloader.dataset.data_prefix == 'test'
    assert sweep.get('test_dataloader') is None and final.get('test_dataloader') is None
    assert final.optim_wrapper.optimizer.lr == lr
    assert final.train_dataloader.num_workers == 0
    # One validation a run.
    log = (tmp_path / 'logs' / f'final_head_lr{lr}_seed0' / 'output.txt').read_text()
    assert log.count('accuracy/top1: ') == 1
    # Nothing but logs and the config is left behind.
    assert not list(tmp_path.rglob('*.pth'))


def test_failures_are_told_and_stop_nothing_else(config, tmp_path, monkeypatch, capsys):
    def score(cell):
        if cell.lr == 1e-2:
            os.kill(os.getpid(), signal.SIGKILL)
        if cell.lr == 3e-2:
            return float('nan')
        if cell.seed == 1:
            raise RuntimeError('out of\nmemory')
        return 1.

    begun = scored(monkeypatch, score)
    args = dict(methods=['full', 'head'], lrs=['1e-3', '3e-3', '1e-2', '3e-2'], metric='m')
    found = run(config, tmp_path, '--seeds', '0', '1', **args)
    errors = {key(e): e['error'] for e in lines(tmp_path) if e['error']}
    assert errors['sweep', 'full', 1e-2, 0] == 'the process ended with SIGKILL'
    assert errors['final', 'full', 3e-3, 1] == 'RuntimeError: out of memory'
    assert 'RuntimeError: out of memory' in capsys.readouterr().out
    for row in found['methods']:
        assert row['scores'] == {'0': 1.} and row['failed'] == 1
        assert row['sweep'] == {'0.001': 1., '0.003': 1., '0.01': None, '0.03': None}
    text = (tmp_path / 'methods.md').read_text()
    assert 'full: 1 final runs failed' in text and 'out of memory' in text

    # Only what failed is tried again.
    begun.clear()
    monkeypatch.undo()
    begun = scored(monkeypatch, lambda cell: 1. if cell.lr < 3e-2 else .5)
    found = run(config, tmp_path, '--seeds', '0', '1', **args)
    assert {(c.phase, c.lr, c.seed) for c in begun} == {
        ('sweep', 1e-2, 0), ('final', 3e-3, 1)}
    assert found['methods'][0]['failed'] == 0


def test_a_method_that_does_not_fit_is_left_out(config, tmp_path):
    broken = tmp_path / 'broken.py'
    broken.write_text(BROKEN)
    found = run(config, tmp_path / 'out', methods=[str(broken), 'lora', 'head'], lrs=['1e-2'])
    rows = {row['method']: row for row in found['methods']}
    assert 'NoSuchHook' in rows['broken']['error'] and rows['broken']['mean'] is None
    assert 'ResNet has none' in rows['lora']['error']
    assert rows['head']['mean'] is not None and not rows['head']['error']
    assert rows['head']['trained_backbone'] == 0
    assert {e['method'] for e in lines(tmp_path / 'out') if e['phase'] != 'cost'} == {'head'}
    assert not (tmp_path / 'out' / 'holdout.json').exists()  # one rate, no sweep


# --- rates ------------------------------------------------------------------------------------


def sweep_to_its_end(score, lrs=(1e-3, 3e-3, 1e-2), scale=1.) -> tuple:
    """Sweeps one method whose score is a function of the rate."""
    method = Method('head', None, lr_scale=scale)
    plan, results = Plan([method], lrs, [0], [0], 'm'), {}
    while True:
        sweep = sweep_of(plan, method, results)
        left = [cell for cell in sweep.cells if cell not in results]
        if not left:
            return sweep, sorted(cell.lr for cell in results)
        for cell in left:
            value = score(cell.lr)
            results[cell] = dict(metrics={} if value is None else dict(m=value),
                                 error='' if value is not None else 'failed')


@pytest.mark.parametrize('score, best, tried, edge', [
    (lambda lr: -abs(lr - 3e-3), 3e-3, [1e-3, 3e-3, 1e-2], ''),
    (lambda lr: -abs(lr - 0.03), 0.0333, [1e-3, 3e-3, 1e-2, 0.0333, 0.111], ''),
    (lambda lr: lr, 0.111, [1e-3, 3e-3, 1e-2, 0.0333, 0.111], 'highest'),
    (lambda lr: -lr, 1.11e-4, [1.11e-4, 3.33e-4, 1e-3, 3e-3, 1e-2], 'lowest'),
    (lambda lr: 0., 3e-3, [1e-3, 3e-3, 1e-2], ''),
    (lambda lr: lr if lr < 5e-3 else None, 3e-3, [1e-3, 3e-3, 1e-2], ''),
    (lambda lr: None, None, [1e-3, 3e-3, 1e-2], ''),
])
def test_the_grid_is_extended_where_its_last_rate_is_the_best(score, best, tried, edge):
    sweep, rates = sweep_to_its_end(score)
    assert (sweep.best, rates, sweep.edge, sweep.done) == (best, tried, edge, True)


def test_rates_are_what_was_asked_for():
    lrs = [1e-3, 1.2345e-3, 2e-3]
    assert sweep_to_its_end(lambda lr: 0., lrs)[1] == lrs


def test_a_method_may_have_another_scale_of_rates():
    assert sweep_to_its_end(lambda lr: -abs(lr - 3e-2), scale=10.)[1] == [1e-2, 3e-2, 0.1]


def test_no_final_run_before_its_rate_is_known():
    method = Method('head', None)
    plan = Plan([method], [1e-3, 1e-2], [0], [0, 1], 'm')
    assert due(plan, {}) == [Cell('cost', 'head')]
    results = {Cell('cost', 'head'): dict(metrics={}, error='', seconds=1)}
    cells = due(plan, results)
    assert [cell.phase for cell in cells] == ['cost', *['sweep'] * 4]
    # The mean over the sweep's seeds decides: 1.5 against 2.
    for cell, value in zip(cells[1:], (3., 0., 2., 2.)):
        results[cell] = dict(metrics=dict(m=value), error='', seconds=1)
    later = due(plan, results)
    assert {cell.lr for cell in later if cell not in results} == {0.1}
    for cell in later:
        results.setdefault(cell, dict(metrics=dict(m=0.), error='', seconds=1))
    assert due(plan, results)[-1] == Cell('final', 'head', 1e-2, 0)


# --- processes --------------------------------------------------------------------------------


def test_final_runs_leave_their_weights_where_asked(config, tmp_path):
    run(config, tmp_path, '--keep-weights', methods=['full', 'branches'], lrs=['1e-2'])
    weights = {path.parent.name.split('_lr')[0]: path for path in tmp_path.rglob('*.pth')}
    assert set(weights) == {'final_full', 'final_branches'}
    for name, path in weights.items():
        cfg = Config.fromfile(next(path.parent.glob('*.py')))
        assert cfg.test_dataloader.dataset  # tools/test.py takes it
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        slim = checkpoint.read(path)
        assert 'optimizer' not in slim
        checkpoint.load(model, path)
        assert all(torch.equal(tensor, model.state_dict()[key])
                   for key, tensor in slim['state_dict'].items())
        assert ('mmprotune' in slim['meta']) == (name == 'final_branches')


def test_on_gpus_each_run_sees_one(config, tmp_path, monkeypatch):
    """Processes of their own from the ground up, which CUDA needs."""
    monkeypatch.setattr(runs, 'devices', lambda: ['5', '7'])
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,7')
    starts, start = [], multiprocessing.process.BaseProcess.start

    def started(self):
        starts.append((os.environ['CUDA_VISIBLE_DEVICES'], self._start_method))
        start(self)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, 'start', started)
    (tmp_path / 'own_networks.py').write_text(OWN_NETWORKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'config.py').write_text(
        f"_base_ = {config!r}\ncustom_imports = dict(imports=['own_networks'])\n"
        "model = dict(backbone=dict(type='mmengine.OwnResNet'))")
    config = str(tmp_path / 'config.py')
    own = tmp_path / 'own.py'
    own.write_text((tool.METHODS / 'lora.py').read_text())
    run(config, tmp_path, methods=['lora', str(own)], lrs=['1e-2'])
    assert starts == [('5', 'spawn'), ('7', 'spawn')]
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '5,7'
    # They came as far as they should, and imported what the config imports.
    assert all('OwnResNet has none' in e['error'] for e in lines(tmp_path))


def test_what_outlived_the_command_before_it_was_ready_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, 'parent_process',
                        lambda: SimpleNamespace(is_alive=lambda: False))
    process = multiprocessing.get_context('fork').Process(
        target=runs._in_child, args=(dict, tmp_path, 1, ()))
    process.start()
    process.join()
    assert process.exitcode == 0 and not list(tmp_path.iterdir())


def test_which_gpus(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,1')
    assert runs.devices() == ['3', '1']
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    assert runs.devices() == ['0', '1']


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize('args, message', [
    (['--seeds', '1', '1'], '--seeds: a value is there twice: 1 1'),
    (['--lrs', '1e-3', '0.001'], '--lrs: a value is there twice'),
    (['--methods', 'full', 'full'], '--methods: a value is there twice'),
    (['--lrs', '-1'], '--lrs must be positive numbers'),
    (['--lrs', 'nan'], '--lrs must be positive numbers'),
    (['--holdout', '1'], '--holdout must be between 0 and 1, got 1'),
    (['--seeds', '0', '-1'], '--seeds and --sweep-seeds must be at least 0, got -1'),
    (['--jobs', '0'], '--jobs must be at least 1, got 0'),
])
def test_wrong_arguments(args, message, config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(config, tmp_path, *args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('options, message', [
    (dict(methods=['full', 'fool']), "no method 'fool'; known are .*bitfit.*full"),
    (dict(args=['--cfg-options', 'train_dataloader=None']), 'no train_dataloader'),
    (dict(args=['--cfg-options', 'optim_wrapper.optimizer.lr=None']),
     r'no optim_wrapper\.optimizer\.lr'),
    (dict(args=['--holdout', '0.04']),
     r'--holdout 0\.04: 2 of 40 images do not show every class; 4 can, --holdout 0\.1'),
    (dict(args=['--holdout', '0.01']), r'--holdout 0\.01 of the 40 training images is 0'),
    (dict(args=['--cfg-options', 'model.backbone.type=mmprotune.PromptedBackbone']),
     r'model\.backbone is a PromptedBackbone already'),
])
def test_what_cannot_be_compared_is_told_before_anything_runs(options, message, config, tmp_path):
    args = options.pop('args', [])
    with pytest.raises(LaunchError, match=message):
        run(config, tmp_path, *args, **options)
    assert not (tmp_path / 'cells.jsonl').exists()
    assert not (tmp_path / 'logs').exists()


def test_a_metric_that_nobody_reports_is_told_after_the_first_run(config, tmp_path):
    with pytest.raises(LaunchError, match="'mIoU' is not reported; .* accuracy/top1"):
        run(config, tmp_path, metric='mIoU', methods=['head'])
    assert len([e for e in lines(tmp_path) if e['phase'] != 'cost']) == 1
    # What ran is no loss: under another name of the metric it counts.
    begun = [key(e) for e in lines(tmp_path)]
    run(config, tmp_path, methods=['head'])
    assert [key(e) for e in lines(tmp_path)][:len(begun)] == begun
    assert len({key(e) for e in lines(tmp_path)}) == len(lines(tmp_path))


def test_a_run_without_the_metric_stops_nothing(config, tmp_path, monkeypatch):
    begun = scored(monkeypatch, lambda cell: 1.)
    run_cell = runs.run_cell

    def partly(cfg, method, cell, *args):
        found = run_cell(cfg, method, cell, *args)
        return dict(other=2.) if cell.seed == 1 else found
    monkeypatch.setattr(runs, 'run_cell', partly)
    for _ in range(2):
        found = run(config, tmp_path, '--seeds', '0', '1', '2', methods=['head'], lrs=['1e-3'],
                    metric='m')
        assert found['methods'][0]['scores'] == {'0': 1., '2': 1.}
        assert found['methods'][0]['failed'] == 1
    assert len(begun) == 4


def test_another_rate_is_what_the_table_tells_of(config, tmp_path, monkeypatch):
    scored(monkeypatch, lambda cell: 1.)
    for lrs, seeds, rate in ((['1e-3'], ['0'], 1e-3), (['3e-3'], ['0', '1'], 3e-3),
                             (['1e-3', '3e-3', '9e-3', '2.7e-2', '8.1e-2'], ['0'], 9e-3),
                             (['1e-3'], ['0'], 1e-3)):
        found = run(config, tmp_path, '--seeds', *seeds, methods=['head'], lrs=lrs, metric='m')
        assert found['methods'][0]['lr'] == rate
        assert len(found['methods'][0]['scores']) == len(seeds)
        tool.main([config, '--report', '--out', str(tmp_path)])
        assert json.loads((tmp_path / 'methods.json').read_text())['methods'] == found['methods']


def test_a_division_that_nothing_was_run_with_is_no_more(config, tmp_path, monkeypatch):
    def cut(*args):
        raise KeyboardInterrupt

    run_all = runs.run_all
    monkeypatch.setattr(runs, 'run_all', cut)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path)
    monkeypatch.setattr(runs, 'run_all', run_all)
    assert len(json.loads((tmp_path / 'holdout.json').read_text())['held']) == 8
    scored(monkeypatch, lambda cell: 1.)
    run(config, tmp_path, '--holdout', '0.4', metric='m')
    assert len(json.loads((tmp_path / 'holdout.json').read_text())['held']) == 16


def test_another_comparison_is_refused(config, tmp_path, monkeypatch):
    scored(monkeypatch, lambda cell: 1.)
    own = tmp_path / 'own.py'
    own.write_text('backbone = None')
    out, args = tmp_path / 'out', dict(methods=[str(own)], lrs=['1e-3'], metric='m')
    run(config, out, **args)
    before = (out / 'cells.jsonl').read_bytes()
    with pytest.raises(LaunchError, match=r'train_cfg\.max_epochs \(12, now 4\)'):
        run(config, out, '--cfg-options', 'train_cfg.max_epochs=4', **args)
    with pytest.raises(LaunchError, match='--holdout'):
        run(config, out, '--holdout', '0.3', **args)
    own.write_text('backbone = None\noptim_wrapper = dict(clip_grad=dict(max_norm=1.))')
    with pytest.raises(LaunchError, match='the method own'):
        run(config, out, **args)
    own.write_text('backbone = None')
    with open(out / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match='another command is at work'):
            run(config, out, **args)
    assert (out / 'cells.jsonl').read_bytes() == before
    # More seeds and rates are the same comparison.
    run(config, out, '--seeds', '0', '1', **args)
    assert len(lines(out)) == 3


def test_a_report_of_nothing(tmp_path, config):
    with pytest.raises(LaunchError, match='holds no comparison'):
        tool.main([config, '--report', '--out', str(tmp_path)])


def test_a_report_of_some_methods(config, tmp_path, monkeypatch):
    scored(monkeypatch, lambda cell: 1.)
    own = tmp_path / 'own.py'
    own.write_text('backbone = None')
    out = tmp_path / 'out'
    run(config, out, methods=[str(own), 'head'], lrs=['1e-3'], metric='m')
    # Made elsewhere, it tells of the machine that the runs were on.
    monkeypatch.setattr('mmprotune.comparison.report.machine',
                        lambda: dict(versions={}, python='', machine='a notebook'))
    tool.main([config, '--report', '--out', str(out), '--methods', str(own)])
    text = (out / 'methods.md').read_text()
    assert '| own | 1 |' in text and '| head |' not in text
    assert 'a notebook' not in text and f'torch {torch.__version__}' in text
    with pytest.raises(LaunchError, match='holds no run of fool, but of head, own'):
        tool.main([config, '--report', '--out', str(out), '--methods', 'fool'])


def test_a_file_of_results_that_is_none(tmp_path):
    file = tmp_path / 'cells.jsonl'
    file.write_text('{"phase": "sweep"}\n')
    with pytest.raises(LaunchError, match='line 1, is no result of this tool'):
        Results(file)
    assert file.read_text() == '{"phase": "sweep"}\n'
