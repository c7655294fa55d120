"""openmim with the package as it is installed: configs and tools are found by name."""
from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml

from .classification import draw_folder
from .test_packaging import ROOT, build_wheel, copy_tree

pytest.importorskip('mim.cli')
OPTIONS = ('train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'model.backbone.freeze=all',
           'model.backbone.backbone.init_cfg=None', 'param_scheduler=[]',
           *(f'{part}_dataloader.num_workers=0' for part in ('train', 'val', 'test')))


@pytest.fixture(scope='module')
def mim(tmp_path_factory):
    """Runs mim in a folder, with a wheel of this source on the path and no other."""
    folder = tmp_path_factory.mktemp('mim')
    site, work = folder / 'site', folder / 'work'
    build_wheel(copy_tree(folder / 'tree'), folder / 'wheel').extractall(site)
    work.mkdir()
    others = [path for path in os.environ.get('PYTHONPATH', '').split(os.pathsep)
              if path and not os.path.isdir(os.path.join(path, 'mmprotune'))]

    def run(*args: str) -> str:
        result = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', 'from mim.cli import cli; cli()', *args],
            cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(site), *others]),
                 'PATH': os.path.dirname(sys.executable) + os.pathsep + os.environ['PATH'],
                 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'})
        assert result.returncode == 0, result.stdout
        return result.stdout

    run.folder = work
    return run


def test_download_writes_the_config_and_no_weights(mim):
    printed = mim('download', 'mmprotune', '--config', 'resnet50_protune_cifar10', '--dest', '.')
    assert 'Successfully dumped resnet50_protune_cifar10.py' in printed
    assert [path.name for path in mim.folder.iterdir()] == ['resnet50_protune_cifar10.py']
    (mim.folder / 'resnet50_protune_cifar10.py').unlink()


def test_train_test_and_run(mim):
    text = (ROOT / 'docs' / 'own_classification.md').read_text()
    code = re.search(r'^```python\n(.*?)^```$', text, re.DOTALL | re.MULTILINE)[1]
    (mim.folder / 'mine.py').write_text(code.replace('cls_backbone_r50', 'cls_backbone_r18'))
    for part, counts in (('train', (2, 2, 2)), ('val', (1, 1, 1))):
        draw_folder(mim.folder / 'data' / 'mine' / part, counts)
    # A random backbone that two processes draw alike.
    options = ('--cfg-options', *OPTIONS, 'randomness.seed=0')
    mim('train', 'mmprotune', 'mine.py', '--gpus', '0', '--work-dir', 'run', *options)
    assert (mim.folder / 'run' / 'epoch_1.pth').is_file()
    printed = mim('test', 'mmprotune', 'mine.py', '--checkpoint', 'run/epoch_1.pth', '--gpus', '0',
                  '--work-dir', 'tested', *options)
    assert 'accuracy/top1' in printed
    printed = mim('run', 'mmprotune', 'prompt_checkpoint', 'info', 'run/epoch_1.pth')
    assert 'slim checkpoint' in printed


def test_the_page_names_what_there_is():
    text = (ROOT / 'docs' / 'mim.md').read_text()
    configs = re.findall(r'mmprotune (\w+\.py)', text)
    assert configs and all((ROOT / 'configs' / name).is_file() or name == 'my_config.py'
                           for name in configs)
    index = yaml.safe_load((ROOT / 'configs' / 'metafile.yml').read_text())
    assert {model.get('Weights') for model in index['Models']} == {'no-weights-are-published/'}
