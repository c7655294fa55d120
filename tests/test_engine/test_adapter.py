"""Adapters that are packed, loaded and pushed; strangers' folders that are refused."""
from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmprotune
from mmprotune import checkpoint
from mmprotune.checkpoints.meta import describe_model
from mmprotune.config_nodes import parse_config
from mmprotune.errors import (
    CheckpointError,
    FingerprintMismatch,
    IncompleteCheckpoint,
    PretrainedFileError,
    TrunkError,
    UnreadableCheckpoint,
)
from tests.classification import classification_scope
from tests.test_checkpoints.models import CLASSES, prompted_config, same_weights, trained_model
from tests.test_tools.conftest import REPO, load_tool

pytest.importorskip('safetensors')
FILES = {'adapter.safetensors', 'config.py', 'README.md'}
tool = load_tool('prompt_checkpoint.py')


class Run:
    """A work directory as training leaves it, and the model that it trained."""

    def __init__(self, folder, file) -> None:
        self.folder, self.file = folder, str(file)
        cfg = prompted_config(file)
        cfg.work_dir, cfg.launcher = str(folder), 'none'
        cfg.train_cfg = dict(by_epoch=True, max_epochs=2)
        cfg.train_dataloader.dataset.dataset.datasets[0].data_root = 'data/flowers'
        self.cfg = cfg
        with classification_scope():
            self.model = trained_model(cfg)
        for epoch in (1, 2):
            torch.save(dict(
                meta=dict(epoch=epoch, iter=10 * epoch, seed=7,
                          mmengine_version='0.10.7' + '0e29' * 10,
                          cfg=cfg.pretty_text, dataset_meta=dict(classes=CLASSES),
                          mmprotune=describe_model(self.model)),
                state_dict=self.model.state_dict(), optimizer=dict(state={}, param_groups=[])),
                folder / f'epoch_{epoch}.pth')
        (folder / 'last_checkpoint').write_text(str(folder / 'epoch_2.pth'))
        log = folder / '20260101_000000' / 'vis_data'
        log.mkdir(parents=True)
        (log / 'scalars.json').write_text('\n'.join(map(json.dumps, (
            {'lr': 1e-2, 'loss': 0.5, 'epoch': 2, 'step': 2},
            {'accuracy/top1': 50.0, 'data_time': 0.1, 'time': 0.2, 'step': 1},
            {'accuracy/top1': 61.5, 'coco/bbox_mAP_l': -1., 'data_time': 0.1, 'step': 2},
        ))) + '\n{"cut o')


@pytest.fixture(scope='module')
def run(tmp_path_factory, resnet18_file) -> Run:
    with DefaultScope.overwrite_default_scope('mmdet'):
        return Run(tmp_path_factory.mktemp('run'), resnet18_file)


@pytest.fixture(scope='module')
def packed(run, tmp_path_factory):
    out = tmp_path_factory.mktemp('packed') / 'flowers'
    mmprotune.pack(run.folder, out, license='apache-2.0')
    return out


@pytest.fixture
def folder(packed, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(packed, tmp_path / 'copy')


# --- pack ---------------------------------------------------------------------------------------


def test_a_work_directory_is_packed_without_what_only_resuming_needs(run, packed):
    assert {path.name for path in packed.iterdir()} == FILES
    info = checkpoint.inspect(packed / 'adapter.safetensors')
    assert info['kind'] == 'slim' and not info['resumable'] and info['epoch'] == 2
    own = checkpoint.inspect(run.folder / 'epoch_2.pth')
    assert info['fingerprints'] == own['fingerprints'] and info['groups'] == own['groups']
    read = checkpoint.read(packed / 'adapter.safetensors')
    state_dict = run.model.state_dict()
    assert read['state_dict'].keys() == state_dict.keys()
    assert all(torch.equal(read['state_dict'][key], t) for key, t in state_dict.items())
    assert read['meta']['dataset_meta'] == dict(classes=list(CLASSES))


def test_the_config_is_whole_and_says_nothing_of_the_machine(run, packed, tmp_path):
    shutil.copy(packed / 'config.py', tmp_path)
    cfg = Config.fromfile(tmp_path / 'config.py')  # by itself: it stands on no other file
    assert cfg.model.head == run.cfg.model.head and cfg.test_dataloader == run.cfg.test_dataloader
    name = cfg.model.backbone.backbone.init_cfg.checkpoint
    assert name == 'resnet18.pth' and 'work_dir' not in cfg
    everything = b''.join(path.read_bytes() for path in packed.iterdir())
    assert str(run.folder).encode() not in everything
    assert run.file.encode() not in everything


def test_the_card(run, packed):
    text = (packed / 'README.md').read_text()
    _, front, body = text.split('---\n', 2)
    front = yaml.safe_load(front)
    assert front['license'] == 'apache-2.0' and front['library_name'] == 'mmprotune'
    assert front['pipeline_tag'] == 'image-classification'
    result, = front['model-index'][0]['results']
    assert result['metrics'] == [dict(type='accuracy/top1', name='accuracy/top1', value=61.5)]
    assert checkpoint.inspect(packed / 'adapter.safetensors')['fingerprints']['backbone'] in body
    for part in ('# flowers\n', '`resnet18.pth`', 'CustomDataset (flowers)', '4: a, b, c, d',
                 '61.5', '2 epochs, 20 iterations', 'mmengine 0.10.7 |', "pretrained='FILE'"):
        assert part in body, part


def test_a_run_without_logs_has_a_card_without_metrics(run, tmp_path):
    shutil.copy(run.folder / 'epoch_1.pth', tmp_path / 'epoch_1.pth')
    mmprotune.pack(tmp_path / 'epoch_1.pth', tmp_path / 'out')
    front = yaml.safe_load((tmp_path / 'out' / 'README.md').read_text().split('---\n')[1])
    assert 'model-index' not in front and front['license'] == 'unknown'


def test_a_run_that_saves_no_optimizer_is_packed(run, tmp_path):
    """As the quickstart's: it cannot be resumed, and need not be."""
    folder = tmp_path / 'run'
    folder.mkdir()
    saved = torch.load(run.folder / 'epoch_2.pth', weights_only=True)
    del saved['optimizer']
    torch.save(saved, folder / 'epoch_2.pth')
    assert mmprotune.pack(folder, tmp_path / 'out')['epoch'] == 2


def test_the_hosts_inference_takes_what_is_loaded(run, tmp_path):
    """In a process of its own: the default scope, too, is what a fresh one has."""
    cfg = Config(run.cfg.to_dict())
    cfg.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    mmprotune.pack(run.folder, tmp_path / 'out', cfg)
    found = subprocess.run([sys.executable, '-W', 'ignore', '-c', f"""
import mmprotune, numpy
model = mmprotune.load({str(tmp_path / 'out')!r}, pretrained={run.file!r})
from mmpretrain import ImageClassificationInferencer
print(ImageClassificationInferencer(model)(numpy.zeros((32, 32, 3), 'uint8'))[0]['pred_class'])
"""], cwd=REPO, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().endswith(CLASSES)  # behind a progress bar


def test_pack_overwrites_nothing_unless_told(run, folder):
    (folder / 'README.md').write_text('mine')
    with pytest.raises(FileExistsError, match='has adapter.safetensors, config.py, README.md al'):
        mmprotune.pack(run.folder, folder)
    assert (folder / 'README.md').read_text() == 'mine'
    mmprotune.pack(run.folder, folder, force=True)
    assert '61.5' in (folder / 'README.md').read_text()


def test_pack_refuses_what_is_no_slim_checkpoint_of_the_config(run, packed, tmp_path,
                                                                     other_resnet18_file):
    full = tmp_path / 'full.pth'
    with classification_scope():
        checkpoint.merge(run.folder / 'epoch_2.pth', run.cfg, full)
    with pytest.raises(CheckpointError, match='a full checkpoint, expected a slim one'):
        mmprotune.pack(full, tmp_path / 'out')
    with pytest.raises(CheckpointError, match='found none'):
        mmprotune.pack(packed, tmp_path / 'out')
    with pytest.raises(FingerprintMismatch):
        mmprotune.pack(run.folder, tmp_path / 'out', prompted_config(other_resnet18_file))
    bare = tmp_path / 'bare.pth'
    torch.save(run.model.state_dict(), bare)
    with pytest.raises(CheckpointError, match='holds no config'):
        mmprotune.pack(bare, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    mmprotune.pack(bare, tmp_path / 'out', run.cfg)  # a name for it is enough
    assert same_weights(mmprotune.load(tmp_path / 'out', pretrained=run.file), run.model)


# --- load ---------------------------------------------------------------------------------------


def test_a_folder_and_a_zip_are_loaded(run, packed, tmp_path):
    archive = shutil.make_archive(str(tmp_path / 'a'), 'zip', packed)
    inside = shutil.make_archive(str(tmp_path / 'b'), 'zip', packed.parent, packed.name)
    for source in (packed, archive, inside):
        model = mmprotune.load(source, pretrained=run.file)
        assert same_weights(model, run.model) and not model.training
        assert model.dataset_meta == dict(classes=list(CLASSES))
        assert model.cfg.model.head.num_classes == 4


def test_load_names_the_file_that_it_needs(run, packed, other_resnet18_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PretrainedFileError, match=r'resnet18.pth cannot be had.*pretrained='):
        mmprotune.load(packed)
    with pytest.raises(FingerprintMismatch, match='another frozen backbone'):
        mmprotune.load(packed, pretrained=other_resnet18_file)
    with pytest.raises(PretrainedFileError, match='pretrained names r50.pth, and the config resn'):
        mmprotune.load(packed, pretrained={'r50.pth': run.file})
    shutil.copy(run.file, tmp_path / 'resnet18.pth')  # where the config says
    assert same_weights(mmprotune.load(packed), run.model)


def test_an_adapter_does_for_a_checkpoint_elsewhere(run, packed):
    with classification_scope():
        assert checkpoint.verify(packed / 'adapter.safetensors', run.cfg)['kind'] == 'slim'
    assert 'fingerprint' in tool._text(checkpoint.inspect(packed / 'adapter.safetensors'))


def test_incomplete_and_damaged_sources(run, folder, tmp_path):
    adapter = folder / 'adapter.safetensors'
    content = adapter.read_bytes()
    adapter.write_bytes(content[:-10])
    with pytest.raises(UnreadableCheckpoint, match='truncated or no PyTorch checkpoint'):
        mmprotune.load(folder, pretrained=run.file)
    tensors = checkpoint.read(run.folder / 'epoch_2.pth')['state_dict']
    from safetensors.torch import save_file
    del tensors['head.fc.bias']
    save_file(tensors, adapter)
    with pytest.raises(IncompleteCheckpoint, match='missing: head.fc.bias'):
        mmprotune.load(folder, pretrained=run.file)
    for header in ('{"a', '[1]', 'null]'):
        save_file(tensors, adapter, {'mmprotune': header})
        with pytest.raises(UnreadableCheckpoint):
            mmprotune.load(folder, pretrained=run.file)
    stock = {key.replace('backbone.backbone.', 'backbone.'): tensor for key, tensor in
             checkpoint.full_state_dict(run.model).items()
             if 'prompts' not in key and 'frozen' not in key}
    save_file(stock, adapter)
    with pytest.raises(CheckpointError, match='has no fingerprint of a frozen backbone'):
        mmprotune.load(folder, pretrained=run.file)
    adapter.unlink()
    with pytest.raises(CheckpointError, match='no packed adapter.*missing: adapter.safetensors'):
        mmprotune.load(folder)
    with pytest.raises(FileNotFoundError, match='no such folder or file'):
        mmprotune.load(tmp_path / 'none' / 'of' / 'this')
    (tmp_path / 'no.zip').write_bytes(b'PK\x03\x04 no')
    with pytest.raises(UnreadableCheckpoint, match='expected a folder, or a .zip of one'):
        mmprotune.load(tmp_path / 'no.zip')


def test_a_zip_does_not_unpack_to_more_than_it_is_nor_outside(packed, tmp_path):
    bomb = tmp_path / 'bomb.zip'
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('adapter.safetensors', bytes(10**7))
    with pytest.raises(UnreadableCheckpoint, match='would unpack to 10,000,000 bytes'):
        mmprotune.load(bomb)
    outside = tmp_path / 'outside.zip'
    with zipfile.ZipFile(outside, 'w') as archive:
        archive.writestr('../config.py', 'x = 1')
        archive.writestr('a/b/adapter.safetensors', b'')
    with pytest.raises(CheckpointError, match='missing: adapter.safetensors'):
        mmprotune.load(outside)
    assert not (tmp_path / 'config.py').exists()


HOSTILE = {
    'a call': ("import os\nos.system('touch {mark}')\n", 'expected an assignment'),
    'a type of the standard library': (
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='os.system', command='touch {mark}')\n", 'model.type: expected a regis'),
    'deep inside': (
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageClassifier', backbone=dict(type='mmprotune.PromptedBackbone', "
        "backbone=dict(type='subprocess.Popen', args=['touch', '{mark}'])))\n",
        'model.backbone.backbone.type'),
    'a function of a known package': (
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='mmengine.fileio.put_text', obj='', filepath='{mark}')\n", 'model.type'),
    'a module on the path': (
        "default_scope = 'mmpretrain'\nmodel = dict(type='hostile_module')\n", 'model.type'),
    'a scope on the path': (
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageClassifier', _scope_='hostile_module')\n", 'model._scope_'),
    'another default scope': (
        "default_scope = 'hostile_module'\nmodel = dict(type='A')\n", 'default_scope must be one'),
    'an expression': (
        "default_scope = 'mmdet'\nmodel = dict(test_cfg=dict(nms=dict(type='__import__(\"os\")')))",
        'model.test_cfg.nms.type'),
    'in the data pipeline': (
        "default_scope = 'mmdet'\nmodel = dict(type='FasterRCNN')\n"
        "test_pipeline = [dict(type='os.system', command='touch {mark}')]", 'test_pipeline.0.type'),
    'code of a download': (
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='ImageClassifier', trust_remote_code=True)", 'trust_remote_code=True'),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_loading_runs_nothing(case, run, folder, tmp_path, monkeypatch):
    mark = tmp_path / 'mark'
    (tmp_path / 'hostile_module.py').write_text(f'open({str(mark)!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path)
    text, match = HOSTILE[case]
    (folder / 'config.py').write_text(text.format(mark=mark))
    with pytest.raises(CheckpointError, match=match):
        mmprotune.load(folder, pretrained=run.file)
    assert not mark.exists() and 'hostile_module' not in sys.modules


def test_a_trunk_builds_nothing_else_either(run, tmp_path):
    """Its configs are those in checkpoints, which strangers may have written as well."""
    content = checkpoint.read(run.folder / 'epoch_2.pth')
    mark = tmp_path / 'mark'
    content['meta']['cfg'] = f"default_scope = 'mmdet'\nmodel = dict(type='os.system', " \
                             f"command='touch {mark}')\n"
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(TrunkError, match="model.type: expected a registered name, got 'os.system'"):
        mmprotune.FrozenTrunk().add('a', tmp_path / 'a.pth')
    assert not mark.exists()


def test_configs_in_the_newer_style_are_no_strangers():
    from mmprotune.checkpoints.untrusted import check_config
    check_config(parse_config(
        "default_scope = 'mmdet'\n"
        "model = dict(type='mmdet.models.detectors.faster_rcnn.FasterRCNN', "
        "roi=dict(type='RoIAlign'), nms=dict(type='nms'), act=dict(type='GELU'))\n"
        "optimizer = dict(type='torch.optim.adamw.AdamW')\n"
        "sampler = dict(type='mmengine.dataset.sampler.DefaultSampler')\n"))


@pytest.mark.parametrize('name', ['pavi://x', 's3://bucket/x.pth', 'local://../x'])
def test_files_of_other_schemes_are_refused(run, folder, name):
    text = (folder / 'config.py').read_text()
    (folder / 'config.py').write_text(text.replace("'resnet18.pth'", f'{name!r}'))
    with pytest.raises(CheckpointError, match='expected a file, or an address'):
        mmprotune.load(folder)


# --- the command line -----------------------------------------------------------------------------


def test_extract_leaves_the_optimizer_and_on_demand_the_head_out(run, tmp_path, capsys):
    config = tmp_path / 'c.py'
    config.write_text(run.cfg.pretty_text)
    source = str(run.folder / 'epoch_2.pth')
    with classification_scope():
        tool.main(['extract', str(config), source, str(tmp_path / 'slim.pth')])
        tool.main(['extract', str(config), source, str(tmp_path / 'prompts.pth'), '--prompts-only'])
    slim, prompts = (torch.load(tmp_path / f'{name}.pth', weights_only=True)
                     for name in ('slim', 'prompts'))
    assert slim.keys() == prompts.keys() == {'meta', 'state_dict'}
    assert slim['state_dict'].keys() == run.model.state_dict().keys()
    kept = {key for key in slim['state_dict'] if key.startswith('backbone.')}
    assert prompts['state_dict'].keys() == kept < slim['state_dict'].keys()
    # It fills the prompts of a model with another head.
    with classification_scope():
        other = trained_model(prompted_config(run.file))
        torch.nn.init.zeros_(other.backbone.prompts['stage1'].expand.weight)
    other.load_state_dict(prompts['state_dict'], strict=False)
    assert all(torch.equal(t, other.state_dict()[key]) for key, t in prompts['state_dict'].items())


def test_pack_of_the_command_line(run, tmp_path, capsys):
    out = str(tmp_path / 'out')
    tool.main(['pack', str(run.folder), out, '--license', 'mit', '--name', 'Mine'])
    assert 'slim checkpoint' in capsys.readouterr().out
    assert 'license: mit' in (tmp_path / 'out' / 'README.md').read_text()
    assert '# Mine' in (tmp_path / 'out' / 'README.md').read_text()


def test_a_missing_extra_is_one_line(run, packed, tmp_path, monkeypatch):
    for name in ('huggingface_hub', 'safetensors', 'safetensors.torch'):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (lambda: mmprotune.load('owner/name'), lambda: mmprotune.push(packed, 'a/b'),
                 lambda: mmprotune.load(packed, pretrained=run.file),
                 lambda: mmprotune.pack(run.folder, tmp_path / 'out')):
        with pytest.raises(CheckpointError, match=r"needs `pip install 'mmprotune\[hub\]'`"):
            call()
    assert not (tmp_path / 'out').exists()


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip('huggingface_hub.constants')
    from huggingface_hub import hf_api

    from tests.test_engine.hub import Hub
    served = Hub()
    # The client reads HF_ENDPOINT when it is imported, which it may have been.
    monkeypatch.setattr(constants, 'ENDPOINT', served.address)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                        served.address + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(hf_api.api, 'endpoint', served.address)
    monkeypatch.setenv('HF_TOKEN', 'hf_test')

    def only_here(host, *args, original=socket.getaddrinfo, **kwargs):
        assert host == '127.0.0.1', f'{host} was asked'
        return original(host, *args, **kwargs)

    monkeypatch.setattr(socket, 'getaddrinfo', only_here)
    yield served
    served.close()


def test_to_the_hub_and_back(run, folder, hub, capsys):
    (folder / 'notes.txt').write_text('my own')
    tool.main(['push', str(folder), 'someone/flowers', '--private'])
    assert capsys.readouterr().out.strip() == f'{hub.address}/someone/flowers'
    assert hub.private == {'someone/flowers': True}
    assert hub.files['someone/flowers'] == {
        name: (folder / name).read_bytes() for name in FILES}
    model = mmprotune.load('someone/flowers', pretrained=run.file)
    assert same_weights(model, run.model)
    # Strangers' repositories are refused as strangers' folders are.
    hub.files['someone/flowers']['config.py'] = b"model = dict(type='os.system')"
    with pytest.raises(CheckpointError, match='default_scope must be one of'):
        mmprotune.load('someone/flowers', pretrained=run.file, revision='other')
    assert 'GET /api/models/someone/flowers/revision/other' in [
        request.partition('?')[0] for request in hub.requests]


def test_what_is_no_adapter_is_not_pushed(folder, hub, tmp_path):
    (folder / 'README.md').unlink()
    with pytest.raises(CheckpointError, match='expected a README.md'):
        mmprotune.push(folder, 'someone/flowers')
    (folder / 'README.md').write_text('x')
    from safetensors.torch import save_file
    save_file({'head.fc.bias': torch.zeros(4)}, folder / 'adapter.safetensors')
    with pytest.raises(CheckpointError, match='no fingerprint'):
        mmprotune.push(folder, 'someone/flowers')
    with pytest.raises(FileNotFoundError, match='no such folder'):
        mmprotune.push('someone/flowers', 'someone/flowers')
    assert not hub.requests


def test_what_the_hub_says_is_told(packed, hub):
    with pytest.raises(CheckpointError, match='nobody/nothing: the hub could not be used'):
        mmprotune.load('nobody/nothing')
    with pytest.raises(CheckpointError, match='the hub could not be used: HFValidationError'):
        mmprotune.push(packed, 'a/b/c')
