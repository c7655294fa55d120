import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS as ROOT_HOOKS

from mmprotune import checkpoint
from mmprotune.engine.hooks import FreezeGuardHook, PromptStatsHook
from mmprotune.errors import FrozenTensorsChanged
from tests.conftest import RESNET18, build
from tests.detection import detector_cfg, draw_coco, run


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    draw_coco(folder)
    return folder


@pytest.fixture
def cfg(prompted_cfg, data, tmp_path):
    return detector_cfg(prompted_cfg, data, tmp_path, **{
        'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 10,
        'default_hooks.checkpoint.interval': 10})


@ROOT_HOOKS.register_module(force=True)
class Meddler(Hook):
    """Breaks the promise at a given iteration, in a given way."""

    def __init__(self, at, how):
        self.at, self.how = at, how

    def before_train(self, runner):
        if self.how == 'too early':
            runner.model.backbone.backbone.conv1.weight.data[0] += 1

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        backbone = runner.model.backbone.backbone
        if runner.iter == self.at:
            if self.how == 'statistics':
                backbone.layer2[0].bn1.running_var.mul_(1.01)
            elif self.how == 'thaw':
                backbone.conv1.weight.requires_grad_(True)
            elif self.how == 'train mode':
                backbone.layer1[0].bn2.train()


# --- FreezeGuardHook -------------------------------------------------------------------------


def test_what_moved_before_the_first_step_is_seen(cfg):
    cfg.custom_hooks = [dict(type='Meddler', at=0, how='too early'),
                        dict(type='mmprotune.FreezeGuardHook')]
    with pytest.raises(FrozenTensorsChanged, match='backbone: frozen tensors are not what they '
                       r'were when the backbone got its weights: expected fingerprint .*…, got'):
        run(cfg)


def test_a_model_with_an_init_cfg_trains_and_its_checkpoint_is_what_was_trained(
        cfg, resnet18_file):
    """Its init_weights() draws new weights for every layer of a type, which passes frozen ones."""
    cfg.model.init_cfg = [dict(type='Normal', layer='Conv2d', std=0.01),
                          dict(type='Constant', layer='_BatchNorm', val=1., bias=0.)]
    cfg.default_hooks.checkpoint.interval = 1
    cfg.custom_hooks = [dict(type='mmprotune.PromptCheckpointHook'),
                        dict(type='mmprotune.FreezeGuardHook')]
    trained = run(cfg).model.eval()
    weights = torch.load(resnet18_file)
    assert torch.equal(trained.backbone.backbone.conv1.weight, weights['conv1.weight'])
    assert torch.equal(trained.backbone.backbone.bn1.weight, weights['bn1.weight'])
    again = build(cfg.model, seed=5).eval()
    checkpoint.load(again, f'{cfg.work_dir}/epoch_1.pth')
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(again.extract_feat(x), trained.extract_feat(x)):
            assert torch.equal(found, expected)


def test_real_training_moves_nothing_frozen(cfg):
    """Through Runner, optimizer with weight decay, the backbone's own norm_eval off."""
    cfg.model.backbone.backbone.norm_eval = False
    cfg.optim_wrapper.optimizer.weight_decay = 0.5
    from mmengine.runner import Runner
    cfg.experiment_name = 'guarded'
    runner = Runner.from_cfg(cfg)
    backbone = runner.model.backbone
    frozen = {n: t.clone() for n, t in backbone.frozen_tensors().items()}
    assert set(frozen) == set(backbone.backbone.state_dict())
    trained = {n: p.detach().clone() for n, p in runner.model.named_parameters()
               if p.requires_grad}
    runner.train()
    assert all(torch.equal(t, frozen[n]) for n, t in backbone.frozen_tensors().items())
    moved = {n for n, p in runner.model.named_parameters()
             if n in trained and not torch.equal(p, trained[n])}
    assert any(n.startswith('backbone.prompts.') for n in moved)
    assert any(n.startswith('roi_head.') for n in moved)
    # The optimizer holds state for exactly what trains.
    state = runner.optim_wrapper.optimizer.state
    assert {n for n, p in runner.model.named_parameters() if p in state} == set(trained)


@ROOT_HOOKS.register_module(force=True)
class Bfloat16Hook(Hook):
    """Runs the backbone under CPU autocast. (The whole detector does not: mmcv's NMS for the CPU
    knows float32 only; AmpOptimWrapper wants a GPU.)"""

    def before_train(self, runner):
        backbone = runner.model.backbone
        forward = backbone.forward

        def mixed(x):
            with torch.autocast('cpu', torch.bfloat16):
                features = forward(x)
            assert {f.dtype for f in features} == {torch.bfloat16}
            return tuple(f.float() for f in features)

        backbone.forward = mixed


def test_mixed_precision_moves_nothing_frozen(cfg):
    cfg.custom_hooks.append(dict(type='Bfloat16Hook'))
    cfg.custom_hooks[1].check_after = 1
    prompts = run(cfg).model.backbone.prompts
    # The guard saw nothing move; the prompts did.
    assert all(block.expand.weight.abs().sum() > 0 for block in prompts.values())
    assert {p.dtype for p in prompts.parameters()} == {torch.float32}


@pytest.mark.parametrize('how, match', [
    ('statistics', r'moved: backbone\.backbone\.layer2\.0\.bn1\.running_var$'),
    ('thaw', r'backbone\.backbone\.conv1\.weight is declared frozen, but its requires_grad'),
    ('train mode', r'backbone\.backbone\.layer1\.0\.bn2 \(BatchNorm2d\) is frozen, but in train'),
])
def test_the_guard_stops_training_early(cfg, how, match):
    cfg.custom_hooks[1].check_after = 1
    cfg.custom_hooks.append(dict(type='Meddler', at=0, how=how))
    with pytest.raises(FrozenTensorsChanged, match=match):
        run(cfg)


def test_the_guard_looks_again_at_the_end(cfg):
    cfg.custom_hooks[1].check_after = 1
    cfg.custom_hooks.append(dict(type='Meddler', at=1, how='statistics'))
    with pytest.raises(FrozenTensorsChanged, match='running_var'):
        run(cfg)


def test_the_guard_needs_something_to_guard(cfg):
    cfg.model.backbone = dict(RESNET18)
    cfg.custom_hooks = [dict(type='mmprotune.FreezeGuardHook')]
    with pytest.raises(ValueError, match='got FasterRCNN without one'):
        run(cfg)


@pytest.mark.parametrize('hook, kwargs', [(FreezeGuardHook, dict(check_after=0)),
                                          (PromptStatsHook, dict(interval=1.5))])
def test_bad_intervals(hook, kwargs):
    with pytest.raises(ValueError, match=f'{next(iter(kwargs))} must be a positive int'):
        hook(**kwargs)


# --- PromptStatsHook -------------------------------------------------------------------------


@ROOT_HOOKS.register_module(force=True)
class Witness(Hook):
    """Computes what PromptStatsHook should report, by other means."""

    priority = 'VERY_HIGH'
    expected: dict = {}

    def before_train(self, runner):
        backbone = runner.model.backbone
        for stage in backbone.stages:
            backbone.prompts[stage.name].register_forward_hook(
                lambda block, args, out, name=stage.name: block.training and self.expected.update(
                    {f'{name}/ratio': (out.norm() / args[0].norm()).item()}) or None)
        step = runner.optim_wrapper.optimizer.step

        def wrapped(*args, **kwargs):
            for name, block in backbone.prompts.items():
                flat = torch.cat([p.grad.flatten() for p in block.parameters()])
                self.expected[f'{name}/grad_norm'] = flat.norm().item()
            return step(*args, **kwargs)

        runner.optim_wrapper.optimizer.step = wrapped


def test_stats_reach_the_message_hub(cfg):
    cfg.custom_hooks[2].interval = 2
    cfg.custom_hooks.append(dict(type='Witness'))
    runner = run(cfg)
    scalars = runner.message_hub.log_scalars
    for stage in range(1, 5):
        for what in ('ratio', 'grad_norm'):
            values, _ = scalars[f'train/prompt/stage{stage}/{what}'].data
            assert len(values) == 1  # two iterations, every second one
            expected = Witness.expected[f'stage{stage}/{what}']
            assert values[-1] == pytest.approx(expected, rel=1e-4)
            assert values[-1] > 0


def test_stats_reach_a_visualizer_backend(cfg, tmp_path):
    cfg.custom_hooks[2].interval = 1
    run(cfg)
    lines = [p.read_text() for p in tmp_path.glob('*/vis_data/scalars.json')]
    assert any('prompt/stage4/ratio' in text and 'prompt/stage1/grad_norm' in text
               for text in lines)


def test_gradients_are_those_of_the_next_step(cfg):
    """Where an interval falls between the steps of accumulated gradients."""
    cfg.train_cfg.max_epochs = 2  # four iterations
    cfg.optim_wrapper.accumulative_counts = 4
    cfg.custom_hooks[2].interval = 3
    cfg.custom_hooks.append(dict(type='Witness'))
    scalars = run(cfg).message_hub.log_scalars
    for stage in range(1, 5):
        values, _ = scalars[f'train/prompt/stage{stage}/grad_norm'].data
        assert values.tolist() == pytest.approx([Witness.expected[f'stage{stage}/grad_norm']])
        assert len(scalars[f'train/prompt/stage{stage}/ratio'].data[0]) == 2  # and the last one


def test_a_run_shorter_than_the_interval_tells_its_last_iteration(cfg, tmp_path):
    cfg.custom_hooks[2].pop('interval', None)
    cfg.custom_hooks.append(dict(type='Witness'))
    scalars = run(cfg).message_hub.log_scalars
    ratios = [scalars[f'train/prompt/stage{stage}/ratio'].data[0] for stage in range(1, 5)]
    assert [len(values) for values in ratios] == [1] * 4
    assert ratios[3][0] == pytest.approx(Witness.expected['stage4/ratio'], rel=1e-4)
    line, = (line for line in next(tmp_path.glob('*/*.log')).read_text().splitlines()
             if 'norm of the prompt over that of its feature' in line)
    assert line.endswith(', '.join(
        f'stage{stage} {values[0]:.3g}' for stage, values in enumerate(ratios, 1)))


def told(folder) -> str:
    """What the log says of what trains, and a warning if there is one."""
    text = next(folder.glob('*/*.log')).read_text()
    return ' '.join(line for line in text.splitlines()
                    if 'parameters that train' in line or 'another learning rate' in line)


def test_what_trains_is_told_once(cfg, tmp_path):
    cfg.model.backbone.trainable = ['layer4.*']
    # The rate is told as it was set: scaled for the batch, but not yet warmed up.
    cfg.param_scheduler.insert(
        0, dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500))
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=1)
    cfg.optim_wrapper.optimizer.weight_decay = 0.05
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={
        'layer4': dict(lr_mult=0.5), 'prompts.stage1': dict(decay_mult=0.)})
    model = run(cfg).model

    def count(part, wanted=True):
        return sum(p.numel() for p in part.parameters() if p.requires_grad == wanted)

    first = count(model.backbone.prompts.stage1)
    rest = count(model.backbone.prompts) - first
    layer4 = count(model.backbone.backbone.layer4)
    head = count(model) - count(model.backbone)
    assert told(tmp_path).endswith(
        f'parameters that train: prompts: {first + rest:,} ({first:,} at lr 0.002, weight decay 0; '
        f'{rest:,} at lr 0.002, weight decay 0.05), rest of the backbone: {layer4:,} ({layer4:,} '
        f'at lr 0.001, weight decay 0.05), rest of the model: {head:,} ({head:,} at lr 0.002, '
        f'weight decay 0.05); frozen: {count(model, False):,}')


@pytest.mark.parametrize(('keys', 'warns'), [
    ({'backbone': dict(lr_mult=0.1)}, True),
    ({'backbone': dict(lr_mult=0.1), 'backbone.prompts': dict(lr_mult=2.)}, False)])
def test_an_inherited_rate_is_warned_of(cfg, tmp_path, keys, warns):
    """By a Runner that nobody has prepared."""
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys=keys)
    cfg.train_cfg.max_epochs = 0
    run(cfg)
    assert f'at lr {0.0001 if warns else 0.002:g}, weight decay' in told(tmp_path)
    assert ('prompts train at another learning rate' in told(tmp_path)) == warns
