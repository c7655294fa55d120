"""A module from anywhere, and a loop without a Runner."""
import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mmprotune import FrozenSnapshot, FrozenTensorsChanged, PromptedBackbone, audit
from mmprotune.checkpoint import FingerprintMismatch
from tests.conftest import wake

torchvision = pytest.importorskip('torchvision')
PAGE = Path(__file__).parents[2] / 'docs' / 'plain_loop.md'


def resnet18(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = torchvision.models.resnet18(weights=None)
    net.fc = nn.Identity()
    return net


def batches(count: int = 3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 64, 64, generator=generator), torch.tensor([0, 1]))
            for _ in range(count)]


def test_the_loop_of_the_page(tmp_path, monkeypatch):
    code, = re.findall(r'^```python\n(import torch\n.*?)^```$', PAGE.read_text(encoding='utf-8'),
                       re.DOTALL | re.MULTILINE)
    assert code.count("weights='DEFAULT'") == 1
    monkeypatch.chdir(tmp_path)
    values = dict(loader=batches())
    torch.manual_seed(0)
    exec(code.replace("weights='DEFAULT'", 'weights=None'), values)
    model, backbone = values['model'], values['backbone']
    frozen = {f'0.backbone.{name}' for name in backbone.frozen_names}
    assert len(backbone.prompts) == 4
    assert frozen >= {f'0.backbone.{n}' for n, _ in backbone.backbone.named_parameters()}
    stepped = {n for n, p in model.named_parameters() if p in values['optimizer'].state}
    assert stepped == {n for n, p in model.named_parameters() if n not in frozen}
    assert backbone.prompts.stage1.expand.weight.abs().max() > 0  # they have moved

    saved = torch.load('prompts.pth', weights_only=True)
    assert saved.keys().isdisjoint(frozen) and '1.weight' in saved
    again = nn.Sequential(PromptedBackbone(copy.deepcopy(backbone).unwrap()), nn.Linear(512, 10))
    assert str(again.load_state_dict(saved)) == '<All keys matched successfully>'
    x = batches(1)[0][0]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), model.eval()(x))
    other = nn.Sequential(PromptedBackbone(resnet18(seed=1)), nn.Linear(512, 10))
    with pytest.raises(FingerprintMismatch, match='another frozen backbone'):
        other.load_state_dict(saved)


def test_nothing_of_the_module_moves():
    net = resnet18()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = nn.Sequential(PromptedBackbone(net), nn.Linear(512, 2)).train()
    assert model[0].backbone is net and not net.training
    snapshot = FrozenSnapshot(model)
    wake(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for images, labels in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    audit(model, snapshot, training=True)
    assert model[0].unwrap() is net
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with torch.no_grad():
        net.bn1.running_mean.add_(1)
    with pytest.raises(FrozenTensorsChanged, match='bn1.running_mean'):
        audit(model, snapshot)


def test_a_module_counts_as_filled_and_what_does_not_train_never_will():
    net = resnet18()
    net.conv1.requires_grad_(False)
    model = PromptedBackbone(net, trainable=[r'layer4\..*'])
    trains = {n for n, p in net.named_parameters() if p.requires_grad}
    assert trains == {n for n, _ in net.named_parameters() if n.startswith('layer4.')}
    assert 'conv1.weight' in model.frozen_names and model.frozen_source is None
    net = resnet18()
    net.conv1.requires_grad_(False)
    with pytest.raises(ValueError, match='matches only parameters that the backbone itself'):
        PromptedBackbone(net, trainable=[r'conv1\.weight'])


@pytest.mark.parametrize('key, value', [
    ('pretrained', 'file.pth'), ('frozen_from', 'file.pth'),
    ('init_cfg', dict(type='Pretrained', checkpoint='file.pth'))])
def test_files_for_a_module_are_refused(key, value):
    with pytest.raises(ValueError, match=f'{key} must be None where backbone is a module'):
        PromptedBackbone(resnet18(), **{key: value})


def test_a_host_module_does_not_freeze_by_itself_any_more():
    from mmdet.models import ResNet
    net = ResNet(18, base_channels=8, frozen_stages=1, norm_eval=False)
    model = PromptedBackbone(net, trainable=[r'layer2\..*'])
    assert net.frozen_stages == -1
    assert all(p.requires_grad for p in model.train().backbone.layer2.parameters())
    audit(model, training=True)
