"""One frozen backbone in memory, many tasks: results are those of each model alone."""
from __future__ import annotations

import contextlib
import copy
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmprotune
from mmprotune import FrozenTrunk
from mmprotune.errors import (
    CheckpointError,
    DataError,
    FingerprintMismatch,
    MMProtuneError,
    TaskFailed,
    TrunkError,
    UnreadableCheckpoint,
)
from mmprotune.models import pretrained
from tests.conftest import RESNET18

from .tasks import HOSTS, alone, backbone, picture, same, save_task, task_cfg

for host in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(host)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('tasks')


@pytest.fixture(scope='module')
def files(folder, resnet18_file) -> dict[str, str]:
    """Files of each host by where their prompts are: 'detector-outputs', …"""
    with DefaultScope.overwrite_default_scope('mmdet'):
        return {f'{kind}-{insert}': save_task(
            folder / f'{kind}-{insert}.pth', kind, backbone(resnet18_file, insert), seed)
            for seed, (kind, insert) in enumerate([
                ('detector', 'outputs'), ('segmentor', 'outputs'), ('classifier', 'outputs'),
                ('detector', 'stages'), ('segmentor', 'stages'), ('segmentor', None),
                ('classifier', None)])}


@pytest.fixture(scope='module')
def whole(files) -> FrozenTrunk:
    """All of them; tests leave it as it is."""
    return trunk_of(files)


@pytest.fixture(scope='module')
def report(whole):
    return whole.report()


@pytest.fixture(scope='module')
def image_file(folder) -> str:
    path = folder / 'image.png'
    cv2.imwrite(str(path), picture(1))
    return str(path)


def trunk_of(files, *names) -> FrozenTrunk:
    trunk = FrozenTrunk('cpu')
    for name in names or files:
        trunk.add(name, files[name])
    return trunk


def part(trunk, name):
    return trunk._tasks[name].part


@contextlib.contextmanager
def counted(trunk, names, *paths):
    """Counts the calls of some modules of each task."""
    calls = {name: dict.fromkeys(paths, 0) for name in names}

    def note(name, path):
        def hook(*_):
            calls[name][path] += 1
        return hook

    handles = [part(trunk, name).backbone.get_submodule(path).register_forward_hook(
        note(name, path)) for name in names for path in paths]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# --- results ----------------------------------------------------------------------------------


def test_results_are_those_of_the_hosts_own_inferencers(files, whole, image_file):
    """Of paths and of arrays; twice, as the first image finds out what has to be copied."""
    assert len(whole._trunks()) == 1
    for image in (image_file, Path(image_file), picture(2, (50, 64)), picture(3, (64, 40))):
        expected = {name: alone(path, str(image) if isinstance(image, Path) else image)
                    for name, path in files.items()}
        assert not same(expected['segmentor-outputs'], expected['segmentor-stages'])
        for order in (list(files), list(files)[::-1], list(files)[3:] + list(files)[:3]):
            found = whole(image, order)
            assert list(found) == order
            for name in files:
                assert same(found[name], expected[name]), name


def test_lists_and_images_with_tasks_of_their_own(files, whole):
    names = list(files)
    images = [picture(i) for i in range(3)]
    found = whole(images, [[names[0], names[3]], names[4], [names[6]]])
    assert [list(own) for own in found] == [[names[0], names[3]], [names[4]], [names[6]]]
    assert same(found[0][names[3]], alone(files[names[3]], images[0]))
    assert same(found[1][names[4]], alone(files[names[4]], images[1]))
    found = whole(images[:2], names[0])
    assert same(found[1][names[0]], whole(images[1], [names[0]])[names[0]])
    assert whole([], names[0]) == []


@pytest.mark.parametrize('inner', [
    dict(RESNET18, out_indices=(0, 1, 2, 3)),
    dict(type='mmpretrain.VisionTransformer', img_size=64, patch_size=16, out_type='featmap',
         arch=dict(embed_dims=64, num_layers=4, num_heads=2, feedforward_channels=32)),
    dict(type='mmpretrain.SwinTransformer', img_size=64, window_size=2, out_indices=(0, 1),
         arch=dict(embed_dims=32, depths=[2, 2], num_heads=[1, 2]))], ids=lambda c: c['type'])
def test_backbones(inner, tmp_path):
    """Glue between layers (position tables, window sizes), and lean layers."""
    lean = inner['type'] == 'mmdet.ResNet'
    files = {}
    for name, insert in dict(stages='stages', more='stages', outputs='outputs').items():
        prompted = dict(backbone('', insert, lean=lean), freeze='all', backbone=inner)
        files[name] = save_task(tmp_path / f'{name}.pth', 'classifier', prompted, full=True)
    trunk, image = trunk_of(files), picture(0)
    assert len(trunk._trunks()) == 1
    for _ in range(2):
        found = trunk(image)
        for name, path in files.items():
            assert same(found[name], alone(path, image)), name
    session = trunk._session(list(trunk._tasks.values()))
    first = dict(ResNet='layer1', VisionTransformer='layers.0', SwinTransformer='patch_embed')
    for name in files:
        with session.task(name), torch.no_grad():
            part(trunk, name)(torch.zeros(1, 3, 64, 64))
    taken = [path for _, path in session.taken['more']]
    assert first[inner['type'].rpartition('.')[2]] in taken and '' not in taken
    if lean:
        assert taken[:2] == ['conv1', 'bn1']


# --- computation ------------------------------------------------------------------------------


def test_what_runs_once(whole, report):
    names = [name for name in whole.tasks if 'stages' not in name]
    whole(picture(0), names)
    with counted(whole, names, 'layer1.0.conv1', 'layer4.1.conv2') as calls:
        whole(picture(1), names)
    assert [sum(calls[name].values()) for name in names] == [2, 0, 0, 0, 0]
    told = [what for pair, what in report.pairs.items() if set(pair) <= set(names)]
    assert len(told) == 10 and set(told) == {'the whole backbone'}


def test_prompts_inside_share_up_to_the_first(whole, report):
    names = ['detector-stages', 'segmentor-stages', 'segmentor-outputs']
    for i in range(2):
        whole(picture(i), names)  # the first finds that a ReLU changes the stem's output in place
    with counted(whole, names, 'layer1.0.conv1', 'layer2.0.conv1') as calls:
        whole(picture(2), names)
    assert [list(calls[name].values()) for name in names] == [[1, 1], [0, 1], [0, 1]]
    told = report.pairs['detector-stages', 'segmentor-stages']
    assert told == 'the backbone up to where they part: conv1, bn1, layer1'


def test_outputs_in_another_number(folder, resnet18_file):
    """A classifier that returns the last stage only shares the layers with one that returns all."""
    last = backbone(resnet18_file, None, inner=dict(out_indices=(3, )))
    files = dict(all=save_task(folder / 'all.pth', 'segmentor', backbone(resnet18_file, None)),
                 last=save_task(folder / 'last.pth', 'classifier', last))
    trunk = trunk_of(files)
    told = trunk.report().pairs['all', 'last']
    assert told.endswith('conv1, bn1, layer1, layer2, layer3, layer4')
    found = trunk(picture(0))
    assert all(same(found[name], alone(path, picture(0))) for name, path in files.items())


@pytest.mark.parametrize('options, why', [
    (dict(mean=[0., 0., 0.]), r'mean \[123.675, 116.28, 103.53\].* and mean \[0.0, 0.0, 0.0\]'),
    (dict(scale=(32, 32)), r'make 64x48 and 32x24 \(scale, padding\)')])
def test_other_preprocessing_runs_apart_and_says_so(files, tmp_path, resnet18_file, options, why):
    other = save_task(tmp_path / 'other.pth', 'classifier', backbone(resnet18_file, None),
                      **options)
    files = dict(one=files['segmentor-None'], two=other)
    trunk = trunk_of(files)
    found = trunk(picture(0))
    assert all(same(found[name], alone(path, picture(0))) for name, path in files.items())
    told = trunk.report().pairs['one', 'two']
    assert told.startswith('nothing: their preprocessing differs')
    assert re.search(why, told), told


def test_layers_that_compute_otherwise_are_not_shared(tmp_path, resnet18_file):
    """Equal weights, other strides; another class of another host."""
    files = {}
    for name, inner in dict(plain={}, strided=dict(strides=(1, 2, 2, 1)),
                            other=dict(type='mmpretrain.ResNet', stem_channels=8,
                                       expansion=1)).items():
        prompted = backbone(resnet18_file, None)
        prompted['backbone'].update(inner)
        files[name] = save_task(tmp_path / f'{name}.pth', 'classifier', prompted)
    trunk = trunk_of(files)
    assert len(trunk._trunks()) == 1
    pairs = trunk.report().pairs
    assert 'layer3' in pairs['plain', 'strided'] and 'layer4' not in pairs['plain', 'strided']
    assert 'two classes, mmdet.ResNet and mmpretrain.ResNet' in pairs['plain', 'other']
    found = trunk(picture(0))
    assert all(same(found[name], alone(path, picture(0))) for name, path in files.items())


# --- memory -----------------------------------------------------------------------------------


def test_frozen_tensors_are_in_memory_once(whole, report):
    first, *others = (part(whole, name).frozen_tensors() for name in whole.tasks)
    assert len(first) > 50
    for other in others:
        assert {n: t.data_ptr() for n, t in other.items()} == {
            n: t.data_ptr() for n, t in first.items()}
    entry = report.trunks[0]
    assert entry.nbytes == sum(t.nbytes for t in first.values())
    # No task keeps as much as a part of a backbone of its own.
    for name in whole.tasks:
        model = whole.model(name)
        mine = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in (*model.parameters(), *model.buffers())}
        theirs = {t.untyped_storage().data_ptr() for t in first.values()}
        assert entry.own_bytes[name] == sum(n for p, n in mine.items() if p not in theirs)
    assert 'MiB frozen, once for 7 tasks: detector-outputs (+' in str(report)
    assert 'detector-outputs and segmentor-outputs share the whole backbone' in str(report)


def test_the_second_task_reads_no_pretrained_file(folder, tmp_path, resnet18_file, monkeypatch):
    weights = tmp_path / 'weights.pth'
    weights.write_bytes(Path(resnet18_file).read_bytes())
    files = {kind: save_task(tmp_path / f'{kind}.pth', kind, backbone(weights, 'outputs'))
             for kind in HOSTS}
    trunk = trunk_of(files, 'detector')
    weights.unlink()
    trunk.add('segmentor', files['segmentor'])
    assert len(trunk._trunks()) == 1
    # The first of a trunk needs it.
    with pytest.raises(mmprotune.errors.PretrainedFileError, match='cannot be had'):
        FrozenTrunk('cpu').add('segmentor', files['segmentor'])
    assert not hasattr(pretrained._thread, 'tensors')


def test_removing_gives_memory_back(files):
    trunk = trunk_of(files, 'detector-outputs', 'segmentor-stages')
    trunk(picture(0))
    own = trunk.model('detector-outputs')
    gone = [weakref.ref(parameter) for parameter in (
        *own.roi_head.parameters(), *own.backbone.prompts.parameters())]
    del own
    trunk.remove('detector-outputs')
    assert not any(ref() is not None for ref in gone)
    assert trunk.tasks == ['segmentor-stages'] and 'detector-outputs' not in trunk
    found = trunk(picture(0))
    assert same(found['segmentor-stages'], alone(files['segmentor-stages'], picture(0)))
    held = weakref.ref(part(trunk, 'segmentor-stages'))
    del found
    trunk.remove('segmentor-stages')
    assert held() is None and not trunk._trunks() and not trunk._paths
    assert str(trunk) == 'no tasks'


def test_another_backbone_gets_a_trunk_of_its_own(files, folder, other_resnet18_file):
    files = dict(one=files['classifier-outputs'],
                 two=save_task(folder / 'two.pth', 'classifier',
                               backbone(other_resnet18_file, 'outputs')))
    trunk = trunk_of(files)
    report = trunk.report()
    assert len(report.trunks) == 2 and not report.pairs
    assert '2 trunks: their backbones hold different weights' in str(report)
    found = trunk(picture(0))
    assert all(same(found[name], alone(path, picture(0))) for name, path in files.items())


def test_full_files(files, folder, resnet18_file, other_resnet18_file):
    """Of the trunk's backbone and of another one."""
    full = {name: save_task(folder / f'full-{name}.pth', 'classifier', backbone(file, 'outputs'),
                            full=True)
            for name, file in dict(one=resnet18_file, two=other_resnet18_file).items()}
    assert Path(full['one']).stat().st_size > 1.5 * Path(files['classifier-outputs']).stat().st_size
    trunk = trunk_of(files, 'detector-outputs')
    for name, path in full.items():
        trunk.add(name, path)
    assert len(trunk._trunks()) == 2
    assert part(trunk, 'one').backbone.conv1.weight.data_ptr() == part(
        trunk, 'detector-outputs').backbone.conv1.weight.data_ptr()
    found = trunk(picture(0))
    assert all(same(found[name], alone(path, picture(0))) for name, path in full.items())


def test_one_task_cannot_change_what_the_others_hold(files):
    trunk = trunk_of(files, 'detector-outputs', 'segmentor-stages')
    first, second = (part(trunk, n).backbone.conv1.weight for n in trunk.tasks)
    second.requires_grad_(True)
    second.data = torch.zeros_like(second)
    assert not first.requires_grad and first.any()


# --- safety -----------------------------------------------------------------------------------


def test_threads(files, whole):
    """Calls with several images while tasks come and go."""
    names = ['detector-outputs', 'segmentor-outputs', 'detector-stages', 'segmentor-stages']
    images = [picture(i, size) for i, size in enumerate([(64, 64), (40, 64), (64, 48), (64, 64)])]
    expected = [{name: whole(image, name)[name] for name in whole.tasks} for image in images]

    def call(i):
        own = names[i % 3:] + names[:i % 3]
        found = whole(images[i % 4], own)
        return all(same(found[name], expected[i % 4][name]) for name in own)

    def come_and_go(i):
        whole.add(f'new{i}', files['classifier-None'])
        found = whole(images[0], [f'new{i}', names[0]])
        whole.remove(f'new{i}')
        return same(found[f'new{i}'], expected[0]['classifier-None'])

    before = whole.tasks
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(call, i) for i in range(12)] + [
            pool.submit(come_and_go, i) for i in range(2)]
        assert all(future.result() for future in done)
    assert whole.tasks == before


def test_a_broken_checkpoint_leaves_the_trunk_as_it_was(files, folder, resnet18_file, tmp_path):
    trunk = trunk_of(files, 'detector-outputs')
    before = trunk(picture(0))['detector-outputs']
    frozen = {n: t.clone() for n, t in part(trunk, 'detector-outputs').frozen_tensors().items()}
    content = torch.load(files['classifier-outputs'], weights_only=True)

    def changed(**changes) -> str:
        path = tmp_path / f'broken{len(list(tmp_path.iterdir()))}.pth'
        new = copy.deepcopy(content)
        new['state_dict'].update(changes.pop('state', {}))
        for key in changes.pop('drop', ()):
            del new['state_dict'][key]
        new['meta'].update(changes)
        torch.save(new, path)
        return str(path)

    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes(Path(files['classifier-outputs']).read_bytes()[:5000])
    wrong = torch.zeros_like(frozen['conv1.weight'])
    stock = task_cfg('classifier', dict(RESNET18)).pretty_text
    for path, error, message in (
            (str(truncated), UnreadableCheckpoint, 'truncated'),
            (changed(drop=['head.fc.weight']), CheckpointError, 'head.fc.weight'),
            (changed(state={'head.fc.weight': torch.full((4, 64), float('nan'))}),
             CheckpointError, 'not finite'),
            (changed(state={'backbone.backbone.conv1.weight': wrong}), MMProtuneError,
             'do not match the fingerprint|missing'),
            (changed(state={'backbone.frozen_fingerprint': torch.zeros(32, dtype=torch.uint8)}),
             FingerprintMismatch, 'another frozen backbone'),
            (changed(cfg=stock), CheckpointError, 'no PromptedBackbone'),
            (changed(cfg='import os'), TrunkError, 'expected an assignment'),
            (changed(cfg='a = open("b")'), TrunkError, r'expected plain values, got "open\(.b.\)"'),
            (changed(cfg="default_scope = 'mmaction'\nmodel = dict()"), TrunkError,
             "default_scope must be one of mmdet, mmseg, mmpretrain, got 'mmaction'"),
            (changed(cfg=None), TrunkError, r'holds no config \(meta.cfg\); name it'),
            (str(tmp_path / 'none.pth'), FileNotFoundError, 'none.pth')):
        scope = DefaultScope.get_current_instance().scope_name
        with pytest.raises(error, match=message):
            trunk.add('broken', path)
        assert trunk.tasks == ['detector-outputs']
        assert DefaultScope.get_current_instance().scope_name == scope
        assert not hasattr(pretrained._thread, 'tensors')
    now = part(trunk, 'detector-outputs').frozen_tensors()
    assert all(torch.equal(now[n], t) for n, t in frozen.items())
    assert same(trunk(picture(0))['detector-outputs'], before)


def test_a_config_of_ones_own(files, folder):
    content = torch.load(files['classifier-outputs'], weights_only=True)
    cfg = Config.fromstring(content['meta'].pop('cfg'), '.py')
    path = folder / 'without.pth'
    torch.save(content, path)
    cfg.dump(str(folder / 'own.py'))
    trunk = FrozenTrunk('cpu')
    trunk.add('file', path, config=folder / 'own.py')
    before = cfg.pretty_text
    trunk.add('object', path, config=cfg)
    assert cfg.pretty_text == before
    found = trunk(picture(0))
    assert same(found['file'], found['object'])
    with pytest.raises(MMProtuneError, match="config: no file 'none.py'"):
        trunk.add('none', path, config='none.py')


@pytest.mark.parametrize('error, told', [
    (MemoryError('no more'), "task 'segmentor-outputs' ran out of memory: no more"),
    (torch.cuda.OutOfMemoryError('CUDA out of memory'), "'segmentor-outputs' ran out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'ran out of memory'),
    (KeyError('x'), "task 'segmentor-outputs' failed: KeyError: 'x'")])
def test_a_task_that_fails_is_named_and_the_others_go_on(whole, error, told, monkeypatch):
    names = ['detector-outputs', 'segmentor-outputs', 'classifier-outputs']
    trunk = whole
    expected = trunk([picture(0), picture(1)], names)
    head = trunk.model('segmentor-outputs').decode_head

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(head, 'predict', fail)
        with pytest.raises(TaskFailed, match=told) as stop:
            trunk([picture(0), picture(1)], names)
    for found, whole in zip(stop.value.results, expected):
        assert list(found) == [names[0], names[2]]
        assert all(same(found[name], whole[name]) for name in found)
    again = trunk([picture(0), picture(1)], names)
    assert all(same(a[n], b[n]) for a, b in zip(again, expected) for n in names)


def test_bad_input(files, tmp_path):
    trunk = trunk_of(files, 'detector-outputs', 'classifier-outputs')
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'empty.png').write_bytes(b'')
    image = picture(0)
    for call, error, message in (
            (lambda: trunk.add('detector-outputs', files['segmentor-None']), TrunkError,
             "a task 'detector-outputs' already"),
            (lambda: trunk.add('', files['segmentor-None']), TrunkError, "a word, got ''"),
            (lambda: trunk(image, 'road'), TrunkError,
             "no task 'road'; there are detector-outputs, classifier-outputs"),
            (lambda: trunk(image, ['detector-outputs'] * 2), TrunkError, 'named twice'),
            (lambda: trunk(image, []), TrunkError, 'at least one name'),
            (lambda: trunk(image, 3), TrunkError, 'tasks must be names'),
            (lambda: trunk([image], [['detector-outputs']] * 2), TrunkError, 'for 2 images, .* 1'),
            (lambda: trunk(image, [['detector-outputs']]), TrunkError, 'one list for one image'),
            (lambda: trunk.remove('road'), TrunkError, "no task 'road'"),
            (lambda: trunk.model('road'), TrunkError, "no task 'road'"),
            (lambda: FrozenTrunk('cpu')(image), TrunkError, 'there are no tasks'),
            (lambda: FrozenTrunk('cuda:77'), TrunkError, "'cuda:77' cannot be used"),
            (lambda: trunk(str(tmp_path / 'none.png')), DataError, 'none.png: no such image'),
            (lambda: trunk(tmp_path / 'text.png'), DataError, 'text.png: no image'),
            (lambda: trunk(tmp_path / 'empty.png'), DataError, 'empty.png: the file is empty'),
            (lambda: trunk([image, image[0]]), DataError, r'got shape \(64, 3\) of uint8'),
            (lambda: trunk(image[:0]), DataError, r'shape \(0, 64, 3\)'),
            (lambda: trunk(image[..., :1]), DataError, r'shape \(64, 64, 1\)'),
            (lambda: trunk(image.astype(object)), DataError, 'of object'),
            (lambda: trunk(3), DataError, 'a path or an array .* got int')):
        with pytest.raises(error, match=message):
            call()
    assert len(trunk) == 2 and len(trunk(image)) == 2


def test_tasks_on_several_devices(files):
    trunk = trunk_of(files, 'detector-outputs', 'classifier-outputs')
    trunk.model('classifier-outputs').head.to('meta')
    with pytest.raises(TrunkError, match="'classifier-outputs' is on meta, expected .* on cpu"):
        trunk(picture(0))
    assert list(trunk(picture(0), 'detector-outputs')) == ['detector-outputs']
