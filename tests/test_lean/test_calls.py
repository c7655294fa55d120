"""Nothing about one call lives on a module: threads, passes that interleave, parts called alone."""
import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmprotune.lean import make_lean, restore
from mmprotune.lean.dry_run import tensors_in
from mmprotune.lean.memory import KeptBytes
from tests.conftest import RESNET18, build
from tests.test_lean.networks import SMALL, distance, images, ordinary, outputs_of, prompted, step


def frozen(cfg):
    """A frozen lean backbone without prompts, which recomputes all it can."""
    net = build(cfg)
    net.eval()
    for p in net.parameters():
        p.requires_grad_(False)
    make_lean(net, dict(recompute=True))
    return net


def input_gradient(net, x):
    """Outputs of a network, and the gradient of its images."""
    x = x.clone().requires_grad_()
    outputs = list(tensors_in(net(x)))
    sum((o.sin() * (i + 1)).sum() for i, o in enumerate(outputs)).backward()
    return [*(o.detach() for o in outputs), x.grad]


def in_thread(function):
    """Runs a function in a thread of its own, to its end."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


# --- threads ----------------------------------------------------------------------------------


@pytest.fixture
def eager_threads():
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


# Threads meet in few blocks.
SHORT_SWIN = dict(SMALL['swin'], embed_dims=8, depths=(2, ), num_heads=(1, ), strides=(4, ),
                  out_indices=(0, ))


@pytest.mark.parametrize('cfg', [SHORT_SWIN, RESNET18], ids=['swin', 'resnet'])
def test_calls_in_threads(cfg, eager_threads):
    """Images of another size in each of 40 calls by 4 threads: what they are one after another."""
    net = frozen(cfg)
    batches = [images(1, 3, 32 + 32 * (i % 3), 32 + 32 * (i % 4), seed=i) for i in range(40)]
    expected = [input_gradient(net, x) for x in batches]
    start = threading.Barrier(4)

    def work(first):
        start.wait()
        return [input_gradient(net, x) for x in batches[first::4]]

    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(work, range(4)))
    for i in range(40):
        found = parts[i % 4][i // 4]
        assert all(torch.equal(a, b) for a, b in zip(found, expected[i], strict=True)), i


def test_a_call_within_a_call():
    """Another thread cuts its windows between this one's windows and their attention."""
    net = frozen(SMALL['swin'])
    a, b = images(1, 3, 64, 64, seed=1), images(1, 3, 64, 64, seed=2)
    expected, other = input_gradient(net, a), input_gradient(net, b)
    block = net.stages[0].blocks[0].attn
    stock, inside, go_on = block.window_partition, threading.Event(), threading.Event()

    def partition(x):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(60)
        elif not inside.is_set():
            threads.append(pool.submit(input_gradient, net, b))
            assert inside.wait(60)
        return stock(x)

    block.window_partition, threads = partition, []
    with ThreadPoolExecutor(1) as pool:
        try:
            again = input_gradient(net, a)
        finally:
            go_on.set()
        assert all(map(torch.equal, threads[0].result(), other))
    assert all(map(torch.equal, again, expected))


def test_a_hook_that_changes_windows():
    net = frozen(SMALL['swin']).double()
    naive = copy.deepcopy(net)
    restore(naive)
    for m in (net, naive):
        m.stages[0].blocks[0].attn.w_msa.register_forward_pre_hook(
            lambda m, args: (args[0].flip(1) * 2, *args[1:]))
    x = images(1, 3, 64, 64, dtype=torch.float64)
    assert distance(input_gradient(net, x), input_gradient(naive, x)) < 1e-10


class Meanwhile(nn.Module):
    """While it runs, another thread does something."""

    def __init__(self, net, what):
        super().__init__()
        self.net = net
        self.what = [what]

    def forward(self, x):
        in_thread(self.what[0])
        return self.net(x)


def test_inference_while_a_network_is_made_lean():
    """It changes nothing of what is planned, and of what is said to be kept."""
    other = prompted(SMALL['vit'], lean=dict(recompute=True))
    reports = []
    for what in (lambda: None, lambda: outputs_of(other, images(1, 3, 96, 64))):
        net = build(SMALL['vit'])
        net.eval()
        for p in net.parameters():
            p.requires_grad_(False)
        reports.append(make_lean(net, dict(recompute=0.2), root=Meanwhile(net, what)))
    assert reports[0].recomputed and reports[0] == reports[1]


def test_bytes_are_counted_for_one_thread():
    """Others may be in the midst of a network when counting begins, and when it ends."""
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):

        def forward(self, x):
            inside.set()
            assert go_on.wait(10)
            return x * 2

    net, busy = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU()), nn.Sequential(Waits(), nn.ReLU())
    for m in busy.modules():  # which goes through the hooks of all modules at its end
        m.register_forward_hook(lambda m, args, y: None)
    x = images(1, 3, 8, 8)
    with KeptBytes(net) as kept:
        alone = net(x)
    expected = kept.by_module()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(busy, x)
        assert inside.wait(10)
        with KeptBytes(net) as kept:
            go_on.set()
            assert torch.equal(result.result(), (x * 2).relu())
            found = net(x)
            assert kept.by_module() == expected
    assert torch.equal(alone, found)


# --- passes that interleave -------------------------------------------------------------------


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('name', ['resnet', 'swin', 'vit', 'convnext', 'cspnext'])
def test_a_network_that_is_run_again_in_the_backward_pass(name, reentrant):
    """With everything recomputed; several passes before one backward."""
    net = frozen(SMALL[name]).double()
    naive = copy.deepcopy(net)
    restore(naive)
    found = []
    for m in (net, naive):
        a, b = (images(1, 3, 96, 64, dtype=torch.float64, seed=s).requires_grad_() for s in (1, 2))

        def run(x, m=m):
            return tuple(tensors_in(m(x)))

        outputs = [*checkpoint(run, a, use_reentrant=reentrant), *run(b),
                   *checkpoint(run, b, use_reentrant=reentrant)]
        sum((o.sin() * (i + 1)).sum() for i, o in enumerate(outputs)).backward()
        found.append([*(o.detach() for o in outputs), a.grad, b.grad])
    assert distance(*found) < 1e-9


@pytest.mark.parametrize('part', ['layer2', 'layer3.0', 'layer3.0.conv1', 'layer3.0.bn1'])
def test_checkpointing_that_is_turned_on_later(part):
    """MMEngine's, of a stage, a block, and a layer."""
    model = prompted().double()
    naive = ordinary(model)
    turn_on_activation_checkpointing(model.backbone, part)
    x = images(1, 3, 64, 64, dtype=torch.float64)
    (outputs, gradients), (expected, exact) = step(model, x), step(naive, x)
    assert distance(outputs, expected) < 1e-10
    assert distance(gradients.values(), exact.values()) < 1e-8


# --- layers that are called by themselves -----------------------------------------------------


def copies(model):
    return dict(itself=model, copied=copy.deepcopy(model),
                pickled=pickle.loads(pickle.dumps(model)))


def test_layers_alone():
    model = prompted()
    naive = ordinary(model)
    x = images(2, 3, 64, 64)
    for m in copies(model).values():
        m(x)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                y = m.backbone.conv1(x.clone().requires_grad_(grad))
                assert torch.equal(y, naive.backbone.conv1(x))
                assert torch.equal(m.backbone.bn1(y), naive.backbone.bn1(y))
    x.requires_grad_()
    y = model.backbone.bn1(model.backbone.conv1(x))
    exact = torch.autograd.grad(naive.backbone.bn1(naive.backbone.conv1(x)).sin().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x)[0], exact)


def test_parts_that_are_called_alone_train_what_is_put_on_them():
    """A network cut open by hand, as feature extractors do it."""
    model = prompted(RESNET18)
    naive = ordinary(model)
    x = images(1, 3, 64, 64)
    found = []
    for m in (model, naive):
        own = x.clone().requires_grad_()
        net = m.backbone
        y = net.maxpool(net.relu(net.bn1(net.conv1(own))))
        y = checkpoint(net.layer1, y, use_reentrant=True)
        net.layer2(y).sin().sum().backward()
        found.append([own.grad, *(p.grad for p in m.prompts['stage1'].parameters())])
    assert distance(*found) < 1e-4
