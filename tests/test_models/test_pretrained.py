"""Pre-trained files as people have them, through the loaders of the hosts: what each one fills."""
import pytest
import torch
import torchvision
from mmdet.registry import MODELS as DET_MODELS

from mmprotune.registry import MODELS
from tests.conftest import build
from tests.test_models.test_insertion import SWIN

RESNET = dict(type='mmdet.ResNet', depth=18)
ADDRESS = 'https://example.invalid/models/resnet18-0000.pth'


def prompted(backbone: dict, checkpoint, **init_cfg):
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint), **init_cfg)
    return build(dict(
        type='mmprotune.PromptedBackbone', backbone=dict(backbone, init_cfg=init_cfg)))


def trains(model) -> set[str]:
    return {name for name, p in model.backbone.named_parameters() if p.requires_grad}


def same(model, weights: dict) -> set[str]:
    """Names of the backbone's tensors that are what the weights say."""
    state = model.backbone.state_dict()
    return {k for k, v in weights.items() if k in state and torch.equal(state[k], v)}


@pytest.fixture(scope='module')
def resnet() -> dict:
    """Weights of torchvision's ResNet-18, its classifier among them."""
    torch.manual_seed(3)
    return torchvision.models.resnet18().state_dict()


def save_torchvision(weights, folder, monkeypatch):
    torch.save(weights, folder / 'r.pth')
    return folder / 'r.pth', {}


def save_mmpretrain(weights, folder, monkeypatch):
    state = {f'head.{k}' if k.startswith('fc') else f'backbone.{k}': v for k, v in weights.items()}
    torch.save(dict(meta=dict(epoch=100), state_dict=state), folder / 'r.pth')
    return folder / 'r.pth', dict(prefix='backbone.')


def save_detector(weights, folder, monkeypatch):
    """A whole checkpoint of mmdet: a neck, an optimizer, and the history that MMEngine pickles."""
    from mmengine.logging import HistoryBuffer
    state = {f'backbone.{k}': v for k, v in weights.items() if not k.startswith('fc')}
    state['neck.lateral_convs.0.conv.weight'] = torch.zeros(8, 64, 1, 1)
    torch.save(
        dict(meta=dict(epoch=12), state_dict=state, optimizer=dict(state={}, param_groups=[]),
             message_hub=dict(log_scalars={'train/loss': HistoryBuffer([1.], [1])})),
        folder / 'r.pth')
    return folder / 'r.pth', dict(prefix='backbone.')


def save_safetensors(weights, folder, monkeypatch):
    pytest.importorskip('safetensors.torch').save_file(weights, folder / 'r.safetensors')
    return folder / 'r.safetensors', {}


def save_for_an_address(weights, folder, monkeypatch):
    """Where torch.hub keeps what it has downloaded from the address."""
    monkeypatch.setenv('TORCH_HOME', str(folder))
    monkeypatch.delenv('MMENGINE_HOME', raising=False)
    kept = folder / 'hub' / 'checkpoints' / ADDRESS.rpartition('/')[2]
    kept.parent.mkdir(parents=True)
    torch.save(weights, kept)
    return ADDRESS, {}


@pytest.mark.parametrize('save', [save_torchvision, save_mmpretrain, save_detector,
                                  save_safetensors, save_for_an_address])
def test_a_resnet_from_anywhere(resnet, save, tmp_path, monkeypatch):
    file, options = save(resnet, tmp_path, monkeypatch)
    model = prompted(RESNET, file, **options)
    assert not trains(model)
    assert same(model, resnet) == set(model.backbone.state_dict())


def official_swin(weights: dict) -> dict:
    """An mmdet Swin's weights under the names and in the order of the official files."""

    def ours_to_theirs(matrix):  # the order in which a 2x2 patch is unfolded
        out, channels = matrix.shape
        return matrix.reshape(out, channels // 4, 4)[:, :, [0, 2, 1, 3]].transpose(1, 2).reshape(
            out, channels)

    state = {}
    for name, value in weights.items():
        if '.downsample.' in name:
            value = ours_to_theirs(value if value.dim() == 2 else value[None])
            value = value if 'reduction' in name else value[0]
        for ours, theirs in (('stages.', 'layers.'), ('attn.w_msa.', 'attn.'),
                             ('ffn.layers.0.0.', 'mlp.fc1.'), ('ffn.layers.1.', 'mlp.fc2.'),
                             ('patch_embed.projection', 'patch_embed.proj')):
            name = name.replace(ours, theirs)
        state[name] = value
    state['head.weight'] = torch.zeros(10, 128)
    return state


@pytest.fixture(scope='module')
def swin() -> dict:
    torch.manual_seed(4)
    model = DET_MODELS.build(dict(SWIN))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return {k: v for k, v in model.state_dict().items() if not k.startswith('norm')}


NORMS = {f'norm{i}.{name}' for i in range(4) for name in ('weight', 'bias')}


def test_official_swin(swin, tmp_path):
    torch.save(dict(model=official_swin(swin)), tmp_path / 'swin.pth')
    model = prompted(dict(SWIN, convert_weights=True), tmp_path / 'swin.pth')
    assert trains(model) == NORMS  # what a detector adds; the file ends in one norm, named norm
    assert same(model, swin) == set(swin)


def test_resized_position_tables_count_as_filled(swin, tmp_path):
    """Windows of 5 instead of 7 pixels: the host interpolates the tables; they are frozen."""
    # (A file that holds the index of another window as well is refused by mmdet itself.)
    torch.save({f'backbone.{k}': v for k, v in swin.items() if 'position_index' not in k},
               tmp_path / 'swin.pth')
    model = prompted(dict(SWIN, window_size=5), tmp_path / 'swin.pth')
    assert trains(model) == NORMS
    tables = {n for n in model.frozen_names if 'position_bias_table' in n}
    assert len(tables) == 5
    assert model.backbone.get_parameter(sorted(tables)[0]).shape == (81, 1)
    assert not tables & same(model, swin)


@pytest.mark.parametrize('host', ['mmpretrain', 'mmseg'])
def test_tables_of_a_beit_are_stretched(host, tmp_path):
    """With the function that SciPy 1.14 took away."""
    if host == 'mmpretrain':
        cfg = dict(type='mmpretrain.BEiTViT', patch_size=8, out_type='featmap', arch=dict(
            embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=32))
    else:
        cfg = dict(type='mmseg.BEiT', patch_size=8, embed_dims=32, num_layers=2, num_heads=2,
                   out_indices=(1, ), mlp_ratio=1, qv_bias=True, init_values=0.1)
    torch.manual_seed(0)
    small = MODELS.build(dict(cfg, img_size=(64, 64)))
    for parameter in small.parameters():
        torch.nn.init.normal_(parameter)
    weights = small.state_dict()
    torch.save(weights, tmp_path / 'beit.pth')
    model = prompted(dict(cfg, img_size=(96, 96)), tmp_path / 'beit.pth')
    assert not trains(model)
    tables = {n: t for n, t in model.backbone.state_dict().items() if n.endswith('bias_table')}
    assert len(tables) == 2
    for name, table in tables.items():
        old, new = weights[name][:-3].T.reshape(2, 15, 15), table[:-3].T.reshape(2, 23, 23)
        # The patch itself, its neighbours and the extra tokens are where they were.
        assert torch.allclose(new[:, 10:13, 10:13], old[:, 6:9, 6:9], atol=1e-3)
        assert torch.equal(table[-3:], weights[name][-3:])
        assert not torch.allclose(new, new.transpose(1, 2), atol=0.1)


@pytest.mark.parametrize('cfg, added', [
    (dict(type='mmpretrain.ConvNeXt', arch='atto', out_indices=(0, 1, 2, 3),
          gap_before_final_norm=False),
     {f'norm{i}.{name}' for i in range(3) for name in ('weight', 'bias')}),
    (dict(type='mmpretrain.VisionTransformer', patch_size=16, img_size=64, out_type='featmap',
          arch=dict(embed_dims=48, num_layers=4, num_heads=3, feedforward_channels=96)),
     {'ln1.weight', 'ln1.bias'}),
], ids=lambda value: value['type'] if isinstance(value, dict) else '')
def test_output_norms_that_no_file_holds_train(cfg, added, tmp_path):
    torch.manual_seed(5)
    stock = MODELS.build(dict(cfg))
    stock.init_weights()
    assert added < set(stock.state_dict())
    weights = {k: v + 0.5 for k, v in stock.state_dict().items() if k not in added}
    torch.save(weights, tmp_path / 'file.pth')
    model = prompted(cfg, tmp_path / 'file.pth')
    assert trains(model) == added
    assert same(model, weights) == set(weights)
    assert {f'backbone.{name}' for name in added} <= set(model.state_dict())


def test_too_little_is_an_error_with_both_sides_keys(resnet, tmp_path):
    """The line is drawn at 90%."""
    from mmprotune.errors import PretrainedFileError
    names = [n for n, _ in MODELS.build(dict(RESNET)).named_parameters()]
    for share, enough in ((0.92, True), (0.88, False)):
        kept = set(names[:round(share * len(names))])
        file = tmp_path / f'{share}.pth'
        torch.save({k: v for k, v in resnet.items() if k in kept or k not in names}, file)
        if enough:
            assert trains(prompted(RESNET, file)) == set(names) - kept
        else:
            with pytest.raises(PretrainedFileError, match=r'fills \d+ of 60 parameters of ResNet, '
                               r"expected at least 90%.*begin with \['conv1.weight'.*backbone with "
                               r"\['conv1.weight'"):
                prompted(RESNET, file)


# --- a whole model's checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'student.backbone.', 'backbone.backbone.'])
def test_the_part_of_a_whole_model_fills_the_backbone(resnet, prefix, tmp_path):
    torch.save(dict(state_dict={
        **{f'{prefix}{k}': v for k, v in resnet.items() if not k.startswith('fc')},
        **{k.replace('student', 'teacher'): v + 1 for k, v in {
            f'{prefix}{k}': v for k, v in resnet.items()}.items() if 'student' in prefix},
        'neck.conv.weight': torch.zeros(8, 64, 1, 1)}), tmp_path / 'whole.pth')
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET,
                       frozen_from=str(tmp_path / 'whole.pth')))
    assert not trains(model)
    assert same(model, resnet) == set(model.backbone.state_dict())
    assert model.frozen_source == str(tmp_path / 'whole.pth')


def test_a_whole_models_checkpoint_comes_after_the_backbones_own_file(resnet, tmp_path):
    """What it does not hold stays as the own file filled it, frozen too."""
    torch.save(resnet, tmp_path / 'own.pth')
    later = {f'backbone.{k}': v + 1 for k, v in resnet.items() if k.startswith('layer')}
    torch.save(later, tmp_path / 'whole.pth')
    backbone = dict(RESNET, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'own.pth')))
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=backbone,
                       frozen_from=str(tmp_path / 'whole.pth')))
    assert not trains(model)
    assert torch.equal(model.backbone.conv1.weight, resnet['conv1.weight'])
    assert torch.equal(model.backbone.layer1[0].conv1.weight, resnet['layer1.0.conv1.weight'] + 1)


def test_a_whole_model_of_something_else(tmp_path):
    from mmprotune.errors import PretrainedFileError
    torch.save({'backbone.features.0.weight': torch.zeros(1)}, tmp_path / 'vgg.pth')
    with pytest.raises(PretrainedFileError, match=r'frozen_from: .*vgg.pth holds nothing of a '
                       r"ResNet.*'backbone.features.0.weight'.*'conv1.weight'"):
        build(dict(type='mmprotune.PromptedBackbone', backbone=RESNET,
                   frozen_from=str(tmp_path / 'vgg.pth')))
