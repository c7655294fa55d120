"""The page of tools/demo.py: what its button does, without a browser, and the server."""
import subprocess
import sys
import urllib.request

import cv2
import numpy as np
import pytest

from mmprotune import FrozenTrunk
from mmprotune.engine import cli
from mmprotune.errors import LaunchError
from tests.test_engine.tasks import HOSTS, backbone, picture, save_task
from tests.test_tools.conftest import REPO, load_tool

tool = load_tool('demo.py')


@pytest.fixture(scope='module')
def files(tmp_path_factory, resnet18_file):
    folder = tmp_path_factory.mktemp('tasks')
    return {kind: save_task(folder / f'{kind}.pth', kind, backbone(resnet18_file, insert='outputs'))
            for kind in HOSTS}


@pytest.fixture(scope='module')
def page(files):
    trunk = FrozenTrunk(device='cpu')
    for name, file in files.items():
        trunk.add(name, file)
    return tool.Page(trunk)


def test_overlays_maps_times_and_memory(page):
    photo = picture(1, (48, 64))
    found = page.look(photo, ['classifier', 'segmentor'], maps=True, apart=True)
    assert [caption for _, caption in found.overlays] == ['segmentor', 'classifier']
    assert found.overlays[0][0].shape == photo.shape
    assert not np.array_equal(found.overlays[0][0], photo)
    assert [caption.partition(':')[0] for _, caption in found.maps] == [
        f'{name} output{i}' for name in ('segmentor', 'classifier') for i in range(4)]
    assert all(drawn.std() > 10 for drawn, _ in found.maps)
    names, together, alone = zip(*found.times)
    assert names == ('segmentor', 'classifier', 'together')
    assert together[:2] == (None, None) and together[2] > 0 and all(alone)

    quick = page.look(photo, ['detector'], maps=False, apart=False)
    assert not quick.maps and [row[2] for row in quick.times] == [None, None]


def test_memory_counts_the_trunk_once(page):
    rows = {what: held for what, *held in page.memory}
    here, separate = rows.pop('all tensors')
    assert set(rows) == {'frozen ResNet', *(f'{name}: prompts, neck, head' for name in HOSTS)}
    assert rows['frozen ResNet'][1] == pytest.approx(3 * rows['frozen ResNet'][0], abs=0.2)
    assert separate > here
    assert 'share the whole backbone' in page.shared


def test_the_lowest_score_counts(page):
    photo = np.full_like(picture(2), 90)  # a canvas may move pixels by one
    few, all_ = (page.look(photo, ['detector'], score_thr, maps=False, apart=False).overlays[0][0]
                 for score_thr in (1.0, 0.0))
    assert not np.array_equal(few, all_) and np.array_equal(few, photo)


def test_nothing_to_run(page):
    with pytest.raises(LaunchError, match='choose a picture'):
        page.look(None, ['detector'])
    with pytest.raises(LaunchError, match='tick at least one task'):
        page.look(picture(), [])


def test_names(files, tmp_path):
    file = files['detector']
    assert tool.named_tasks([file, f'other={file}']) == {'detector': file, 'other': file}
    with pytest.raises(LaunchError, match="two tasks are called 'detector'"):
        tool.named_tasks([file, file])
    with pytest.raises(LaunchError, match=r"a: no file 'no.pth'"):
        tool.named_tasks(['a=no.pth'])


def test_a_missing_gradio_is_one_line(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert cli.run_tool(lambda: tool.main([files['detector']])) == 1
    error = capsys.readouterr().err
    assert "extra 'demo'" in error and error.count('\n') == 1


def test_gradio_is_imported_by_nothing_else():
    script = ('import importlib, pkgutil, sys, mmprotune\n'
              'for module in pkgutil.walk_packages(mmprotune.__path__, "mmprotune."):\n'
              '    importlib.import_module(module.name)\n'
              'print(sorted({"gradio", "onnx", "onnxscript", "onnxruntime"} & {*sys.modules}))')
    found = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], cwd=REPO, text=True,
                           capture_output=True, check=True)
    assert found.stdout.splitlines()[-1] == '[]'


def test_the_server_answers(page, tmp_path, monkeypatch):
    gradio = pytest.importorskip('gradio', reason="the extra 'demo' is not installed")
    import gradio_client  # comes with it
    photo = str(tmp_path / 'photo.png')
    cv2.imwrite(photo, picture())
    for name in ('http_proxy', 'https_proxy', 'all_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    blocks, address = tool.serve(gradio, page, '127.0.0.1', 0, wait=False)
    try:
        assert address.startswith('http://127.0.0.1:')
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
        assert answer.status == 200 and 'One frozen trunk' in text
        for host in ('fonts.googleapis.com', 'fonts.gstatic.com'):  # nothing is fetched elsewhere
            assert f'href="https://{host}/css' not in text
        client = gradio_client.Client(address, verbose=False)
        for image, tasks in ((gradio_client.handle_file(photo), ['segmentor']), (None, [])):
            call = [image, tasks, 0.3, True, False]
            if image is None:
                with pytest.raises(gradio_client.exceptions.AppError, match='choose a picture'):
                    client.predict(*call, api_name='/look')
            else:
                overlays, heat, times = client.predict(*call, api_name='/look')
                assert len(overlays) == 1 and len(heat) == 4
                assert [row[0] for row in times['data']] == ['segmentor', 'together']
    finally:
        blocks.close()
