"""What only a CUDA device can show; ``MMPROTUNE_GPU_TESTS=cpu`` runs what it can on the CPU."""
import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from mmprotune.lean import restore
from mmprotune.lean.functional.bits import (
    kernels_for,
    pack_bits,
    pack_bits_anywhere,
    select_bits,
    select_bits_anywhere,
)
from mmprotune.lean.memory import KeptBytes
from mmprotune.testing.noise_batch import noise_batch
from tests.conftest import wake
from tests.test_lean.networks import SMALL, prompted
from tests.test_lean.test_functional.test_bits import COUNTS, masked
from tests.test_lean.test_in_place import LAYERS, layer_of, lean_layer

pytestmark = pytest.mark.gpu
NETWORKS = ('resnet', 'swin', 'vit', 'convnext')


@pytest.fixture(autouse=True)
def whole_mantissas(monkeypatch):
    """TF32, which PyTorch lets convolutions use, rounds to ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.fixture(scope='module')
def device():
    if torch.cuda.is_available():
        return torch.device('cuda')
    if os.environ.get('MMPROTUNE_GPU_TESTS') == 'cpu':
        return torch.device('cpu')
    pytest.skip('needs a CUDA device')


@pytest.fixture
def cuda(device):
    if device.type != 'cuda':
        pytest.skip('needs a CUDA device')
    return device


def images(device, seed=0):
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(seed)).to(device)


def ordinary(model):
    model = copy.deepcopy(model)
    restore(model)
    return model


def step(model, x, **autocast):
    """Features and gradients of one step."""
    model.zero_grad()
    with torch.autocast(x.device.type, **autocast):
        outputs = model(x)
    # Made where the features are: a copy to the device would wait for it.
    sum((y.to(x.dtype) * torch.arange(y.numel(), device=x.device).sin().reshape(y.shape)).mean()
        for y in outputs).backward()
    return [y.detach() for y in outputs], [p.grad for p in model.parameters() if p.requires_grad]


def far(found, expected):
    """Of all tensors together: gradients that all but cancel out are nothing but rounding."""
    difference = sum(float((a.double() - b.double()).square().sum())
                     for a, b in zip(found, expected))
    return (difference / sum(float(b.double().square().sum()) for b in expected))**0.5


@pytest.mark.parametrize('path', LAYERS)
def test_layers_against_autograd(path, device):
    layer, args, shapes = layer_of(path)
    lean, stock = lean_layer(layer)
    lean.to(device), stock.to(device)
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        found = []
        for net in (lean, stock):
            image = x.to(device).requires_grad_()
            y = net(image * 1, *args)
            y.sin().sum().backward()
            found.append((y.detach(), image.grad))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.double],
                         ids=str)
@pytest.mark.parametrize('count', COUNTS)
def test_kernels_that_pack_masks(count, dtype, cuda):
    x, grad = (t.to(cuda) for t in masked(count, dtype))
    assert kernels_for(x) is not None
    bits = pack_bits(x > 0)
    assert torch.equal(bits, pack_bits_anywhere(x > 0)) and torch.equal(bits, pack_bits(x.relu()))
    for found in (select_bits(grad, bits), select_bits_anywhere(grad, bits)):
        assert torch.equal(found, torch.where(x > 0, grad, 0))


def test_kernels_keep_the_order_in_memory(cuda):
    x, grad = (t[:960].view(2, 4, 12, 10).to(cuda, memory_format=torch.channels_last)
               for t in masked(1003))
    found = select_bits(grad, pack_bits(x > 0))
    assert found.stride() == x.stride() and torch.equal(found, torch.where(x > 0, grad, 0))


@pytest.mark.parametrize('name', NETWORKS)
def test_lean_is_exact(name, device):
    model = prompted(SMALL[name], lean=dict(rounds=False)).to(device)
    x = images(device)
    (found, gradients), (expected, exact) = step(model, x, enabled=False), step(
        ordinary(model), x, enabled=False)
    assert far(found, expected) < 1e-5 and far(gradients, exact) < 1e-3


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('name', NETWORKS)
def test_mixed_precision(name, dtype, device):
    """Gradients are as far from those of single precision as the ordinary layers' are."""
    model = prompted(SMALL[name]).to(device)
    x = images(device)
    _, exact = step(ordinary(model), x, enabled=False)
    _, found = step(model, x, dtype=dtype)
    _, usual = step(ordinary(model), x, dtype=dtype)
    assert far(found, exact) < 2 * far(usual, exact) + 1e-3


@pytest.mark.parametrize('name', NETWORKS)
def test_a_gradient_scaler_steps(name, cuda):
    model = prompted(SMALL[name]).to(cuda)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler('cuda')
    before = [p.detach().clone() for p in model.prompts.parameters()]
    for seed in range(16):  # the first scales are too large, and their steps left out
        with torch.autocast('cuda', torch.float16):
            loss = sum(y.float().mean() for y in model(images(cuda, seed)))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(model.prompts.parameters(), before))


def test_channels_last(device):
    model = prompted(SMALL['resnet']).to(device).double()  # rounding moves what a ReLU lets pass
    x = images(device).double()
    expected, exact = step(model, x, enabled=False)
    found, gradients = step(model, x.contiguous(memory_format=torch.channels_last), enabled=False)
    assert far(found, expected) < 1e-9 and far(gradients, exact) < 1e-6


def test_slim_checkpoints_cross_devices(device, tmp_path):
    here, there = prompted(SMALL['resnet']).to(device), prompted(SMALL['resnet'])
    with torch.no_grad():
        for parameter in here.prompts.parameters():
            parameter.add_(0.1)
    torch.save(here.state_dict(), tmp_path / 'slim.pth')
    there.load_state_dict(torch.load(tmp_path / 'slim.pth', map_location='cpu'))
    torch.save(there.state_dict(), tmp_path / 'back.pth')
    again = prompted(SMALL['resnet']).to(device)
    again.load_state_dict(torch.load(tmp_path / 'back.pth', map_location=device))
    with torch.no_grad():
        expected = here.eval()(images(device))
        assert all(map(torch.equal, again.eval()(images(device)), expected))
        assert far([y.to(device) for y in there.eval()(images('cpu'))], expected) < 1e-4


@pytest.mark.parametrize('name', NETWORKS)
def test_nothing_waits_for_the_device(name, cuda):
    model = prompted(SMALL[name]).to(cuda)
    x = images(cuda)
    step(model, x, enabled=False)  # kernels are chosen
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(model, x, enabled=False)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('name', NETWORKS)
def test_lean_takes_less_memory(name, device):
    model = prompted(SMALL[name]).to(device)
    kept = []
    for net in (model, ordinary(model)):
        with KeptBytes(net) as count:
            outputs = net(images(device))
            kept.append(count.total())
        del outputs
    assert kept[0] < 0.9 * kept[1]


@pytest.mark.parametrize('name', NETWORKS)
def test_frozen_weights_in_bf16_are_not_copied_for_the_backward_pass(name, device):
    kept, models = [], [prompted(SMALL[name], backbone_dtype=dtype).to(device)
                        for dtype in ('bfloat16', None)]
    for model in models:
        with torch.autocast(device.type, torch.bfloat16), KeptBytes(model) as count:
            outputs = model(images(device))
            kept.append(count.total())
        sum(y.float().square().mean() for y in outputs).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert 0 < kept[0] <= kept[1]


@pytest.mark.parametrize('name', NETWORKS)
def test_frozen_weights_in_eight_bits(name, cuda):
    model = prompted(SMALL[name], backbone_dtype='int8')
    x = images('cpu')
    expected, exact = step(model, x, enabled=False)
    found, gradients = step(copy.deepcopy(model).to(cuda), x.to(cuda), enabled=False)
    assert far([y.cpu() for y in found], expected) < 1e-4
    assert far([g.cpu() for g in gradients], exact) < 1e-2


def test_compiled(device):
    model = prompted(SMALL['resnet']).to(device).double()
    x = images(device).double()
    expected, exact = step(model, x, enabled=False)
    backend = 'inductor' if device.type == 'cuda' else 'aot_eager'
    found, gradients = step(torch.compile(model, backend=backend), x, enabled=False)
    assert far(found, expected) < 1e-9 and far(gradients, exact) < 1e-6


def test_a_detector_with_compiled_operators_trains(device, resnet18_file):
    from mmengine.registry import MODELS, init_default_scope

    from tests.detection import detector_cfg
    from tests.test_reliability.models import prompted as backbone
    init_default_scope('mmdet')
    cfg = detector_cfg(backbone(resnet18_file), Path('.'), Path('.'))
    model = MODELS.build(cfg.model).to(device)
    wake(model)
    model.train()
    data = model.data_preprocessor(noise_batch(
        cfg, 128, 2, np.random.default_rng(0)), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    for name, parameter in model.backbone.prompts.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def _rank(rank, world, backend, folder):
    torch.backends.cudnn.allow_tf32 = False
    distributed.init_process_group(
        backend, init_method=f'file://{folder}/store', rank=rank, world_size=world)
    place = torch.device('cuda', rank) if backend == 'nccl' else torch.device('cpu')
    model = prompted(SMALL['resnet']).to(place)
    wrapped = DistributedDataParallel(model, [rank] if backend == 'nccl' else None)
    outputs = wrapped(images(place, rank))
    sum(y.square().mean() for y in outputs).backward()
    torch.save([p.grad.cpu() for p in model.prompts.parameters()], f'{folder}/{rank}.pth')
    distributed.destroy_process_group()


def test_processes_average_the_prompts_gradients(device, tmp_path):
    world = torch.cuda.device_count() if device.type == 'cuda' else 2
    backend = 'nccl' if device.type == 'cuda' else 'gloo'
    torch.multiprocessing.spawn(_rank, (world, backend, str(tmp_path)), world)
    found = [torch.load(tmp_path / f'{rank}.pth') for rank in range(world)]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))
    alone = []
    for rank in range(world):
        model = prompted(SMALL['resnet']).to(device)
        sum(y.square().mean() for y in model(images(device, rank))).backward()
        alone.append([p.grad.cpu() for p in model.prompts.parameters()])
    mean = [torch.stack(grads).mean(0) for grads in zip(*alone)]
    assert far(found[0], mean) < 1e-3 and any(isinstance(m, nn.Conv2d) for m in model.modules())
