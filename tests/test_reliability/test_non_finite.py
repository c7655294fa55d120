"""NonFiniteGuardHook: what is caught, what is told, what is left alone."""
import math

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS as ROOT_HOOKS

from mmprotune import NonFiniteGuardHook
from mmprotune.errors import NonFiniteError
from tests.detection import detector_cfg, draw_coco, run

from . import work  # noqa: F401  DrawNaN
from .models import atss_cfg


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    draw_coco(folder)
    return folder


def guarded(cfg, *hooks, **options):
    """Four iterations of one image each, with the guard."""
    cfg.train_cfg.update(max_epochs=1, val_interval=10)
    cfg.train_dataloader.batch_size = 1
    cfg.default_hooks.checkpoint.interval = 1
    cfg.custom_hooks += [dict(type='mmprotune.NonFiniteGuardHook', **options), *hooks]
    return cfg


@pytest.fixture
def cfg(prompted_cfg, data, tmp_path):
    return detector_cfg(prompted_cfg, data, tmp_path)


@ROOT_HOOKS.register_module(force=True)
class BreakGradient(Hook):
    """Makes the gradient of one stage's prompts infinite in some iterations."""
    priority = 'VERY_HIGH'

    def __init__(self, at, stage='stage3'):
        self.at, self.stage = at, stage

    def before_train(self, runner):
        weight = runner.model.backbone.prompts[self.stage].expand.weight
        weight.register_hook(lambda g: g * math.inf if runner.iter in self.at else g)


@ROOT_HOOKS.register_module(force=True)
class Notes(Hook):
    """The weights, and the statistics of norm layers, after every iteration."""
    priority = 'LOWEST'

    def __init__(self):
        self.states = []

    def before_train(self, runner):
        Notes.last = self
        self.order = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.order.append(data_batch['data_samples'][0].img_id)
        self.states.append({k: v.clone() for k, v in runner.model.state_dict().items()})

    def moved(self, i):
        """Whether iteration i (from 1) changed anything."""
        return any(not torch.equal(v, self.states[i - 1][k]) for k, v in self.states[i].items())


def poison(cfg, img_id):
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='DrawNaN', img_id=img_id))
    return cfg


def order_of_images(cfg):
    run(cfg)
    return Notes.last.order


# --- stop ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_image_and_term(cfg, data):
    from mmengine.runner import Runner
    guarded(cfg, dict(type='Notes'))
    order = order_of_images(cfg)
    cfg.experiment_name = cfg.visualizer.name = 'poisoned'
    runner = Runner.from_cfg(poison(cfg, order[2]))
    with pytest.raises(NonFiniteError) as caught:
        runner.train()
    message = str(caught.value)
    assert message.startswith('not finite in iteration 3 (epoch 1): ')
    assert f'(images {order[2]} {data}/{order[2]}.png)' in message
    assert 'loss_rpn_cls is nan' in message
    assert 'in the prompts of stage' in message
    assert 'The weights are those from before this step' in message
    assert all(p.isfinite().all() for p in runner.model.parameters())
    assert all(torch.equal(v, Notes.last.states[-1][k])
               for k, v in runner.model.state_dict().items())


@pytest.mark.parametrize('clip', [None, dict(max_norm=1.)])
def test_a_gradient_that_is_not_finite_stops_with_its_stage(cfg, clip):
    """Clipping spreads it to all parameters; the stage is told all the same."""
    guarded(cfg, dict(type='BreakGradient', at=[1]))
    cfg.optim_wrapper.clip_grad = clip
    with pytest.raises(NonFiniteError, match=r'iteration 2 .*prompts of stage3, at the') as caught:
        run(cfg)
    assert 'loss' not in str(caught.value)
    assert ('in 1 parameters, backbone.prompts.stage3.expand.weight' in str(caught.value)) == \
        (clip is None)


# --- skip ------------------------------------------------------------------------------------


def test_skip_leaves_out_the_step_and_counts_it(cfg, tmp_path):
    cfg.model.neck.norm_cfg = dict(type='BN')  # running statistics that train
    guarded(cfg, dict(type='Notes'), action='skip')
    bad = order_of_images(cfg)[1]
    runner = run(poison(cfg, bad))
    assert Notes.last.order[1] == bad
    assert [Notes.last.moved(i) for i in (1, 2, 3)] == [False, True, True]
    assert any('running_mean' in k and k.startswith('neck') for k in Notes.last.states[0])
    assert all(v.isfinite().all() for v in runner.model.state_dict().values())
    # The count survives in the checkpoint.
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    assert saved['message_hub']['runtime_info']['mmprotune_nonfinite_steps'] == 1
    again = poison(cfg, bad)
    again.resume = True
    again.train_cfg.max_epochs = 2
    guard = next(h for h in run(again).hooks if isinstance(h, NonFiniteGuardHook))
    assert guard.skipped == 2  # one more in the second epoch


def test_skip_gives_up_after_some_in_a_row(cfg):
    guarded(cfg, dict(type='BreakGradient', at=[0, 2, 3]), action='skip', max_consecutive=1)
    with pytest.raises(NonFiniteError, match='iteration 4 .*step 2 in a row: stopped'):
        run(cfg)


def test_skip_drops_all_that_was_accumulated_with_it(cfg):
    guarded(cfg, dict(type='Notes'), action='skip')
    cfg.optim_wrapper.accumulative_counts = 2
    bad = order_of_images(cfg)[0]
    run(poison(cfg, bad))
    # Steps are due after iterations 2 and 4.
    assert [Notes.last.moved(i) for i in (1, 2, 3)] == [False, False, True]


# --- what is no fault -----------------------------------------------------------------------------


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """MMEngine's own mixed-precision wrapper, with PyTorch's own scaler for the CPU."""
    if not hasattr(torch.amp, 'GradScaler'):
        pytest.skip(f'torch {torch.__version__} has a scaler for CUDA only')
    import mmengine.optim.optimizer.amp_optimizer_wrapper as module
    monkeypatch.setattr(module, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(module, 'GradScaler', lambda **kw: torch.amp.GradScaler('cpu', **kw))


@pytest.mark.parametrize('fused', [False, True])
def test_steps_that_the_scaler_leaves_out_are_no_fault(prompted_cfg, data, tmp_path, amp_on_cpu,
                                                       fused):
    cfg = guarded(atss_cfg(prompted_cfg, data, tmp_path), dict(type='Notes'))
    cfg.train_cfg.max_epochs = 2
    cfg.optim_wrapper.update(
        type='AmpOptimWrapper', dtype='bfloat16',
        loss_scale=dict(init_scale=2.**127, backoff_factor=2.**-30))
    cfg.optim_wrapper.optimizer.fused = fused
    runner = run(cfg)
    assert isinstance(runner.optim_wrapper, AmpOptimWrapper)
    assert runner.optim_wrapper.loss_scaler.get_scale() < 2.**127  # it did leave steps out
    # And made others; which ones overflow is a matter of rounding.
    assert any(Notes.last.moved(i) for i in range(1, 8))
    guard = next(h for h in runner.hooks if isinstance(h, NonFiniteGuardHook))
    assert guard.skipped == 0


def test_with_a_scaler_a_loss_is_caught_all_the_same(prompted_cfg, data, tmp_path, amp_on_cpu):
    cfg = guarded(atss_cfg(prompted_cfg, data, tmp_path), dict(type='Notes'))
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale='dynamic')
    bad = order_of_images(cfg)[1]
    with pytest.raises(NonFiniteError, match=f'iteration 2 .*loss_cls is nan.*images {bad} '):
        run(poison(cfg, bad))


def test_a_sound_run_is_the_same_with_the_guard(cfg):
    guarded(cfg, action='skip')
    guarded_weights = run(cfg).model.state_dict()
    del cfg.custom_hooks[-1]
    assert all(torch.equal(v, guarded_weights[k]) for k, v in run(cfg).model.state_dict().items())


@pytest.mark.parametrize('options', [dict(action='ignore'), dict(max_consecutive=0)])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NonFiniteGuardHook(**options)
