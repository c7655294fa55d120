"""What a wheel, a source archive and an editable installation of the package hold."""
from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
OFFLINE = ('--no-index', '--no-deps', '--no-build-isolation', '--disable-pip-version-check')


def copy_tree(target: Path) -> Path:
    """Copies what git would track, so that no build ever writes into the checkout."""
    ignore = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'work_dirs', 'build', 'dist',
                                    'data', '*.pth', '*.whl')
    shutil.copytree(ROOT, target, ignore=ignore)
    shutil.copy(ROOT / '.gitignore', target)
    return target


def run(*command, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    return result.stdout


def pip(*args, cwd: Path) -> str:
    return run(sys.executable, '-m', 'pip', args[0], *OFFLINE, *args[1:], cwd=cwd)


def build_wheel(tree: Path, out: Path) -> zipfile.ZipFile:
    pip('wheel', '--wheel-dir', out, tree, cwd=tree)
    wheel, = out.glob('mmprotune-*.whl')
    return zipfile.ZipFile(wheel)


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


def names_below(names, prefix: str) -> set[str]:
    return {name[len(prefix):] for name in names if name.startswith(prefix)}


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Path:
    return copy_tree(tmp_path_factory.mktemp('packaging') / 'tree')


@pytest.fixture(scope='module')
def wheel(tree) -> zipfile.ZipFile:
    return build_wheel(tree, tree.parent / 'wheel')


@pytest.fixture(scope='module')
def wheel_metadata(wheel):
    name, = (name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))
    return email.message_from_bytes(wheel.read(name))


def test_wheel_holds_the_package_and_what_mim_reads(wheel, tree):
    names = [name for name in wheel.namelist() if '.dist-info/' not in name]
    mim = 'mmprotune/.mim/'
    assert names_below(names, mim + 'configs/') == files_below(tree / 'configs')
    assert names_below(names, mim + 'tools/') == files_below(tree / 'tools')
    assert wheel.read(mim + 'model-index.yml') == (ROOT / 'model-index.yml').read_bytes()
    modules = {name for name in names if not name.startswith(mim)}
    assert modules == {'mmprotune/' + name for name in files_below(tree / 'mmprotune')
                       if name.endswith('.py')}
    assert any(name.endswith('LICENSE') for name in wheel.namelist())


def test_building_a_wheel_leaves_no_mim_folder_in_the_source(wheel, tree):
    assert not (tree / 'mmprotune' / '.mim').exists()


def test_every_config_of_the_model_index_is_packaged(wheel):
    index = wheel.read('mmprotune/.mim/model-index.yml').decode()
    imported = re.findall(r'^\s*-\s*(\S+\.ya?ml)\s*$', index, re.MULTILINE)
    assert imported
    for name in imported:
        assert f'mmprotune/.mim/{name}' in wheel.namelist()


def test_a_wheel_built_from_the_source_archive_is_the_same(wheel, tree, tmp_path):
    backend = f'from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})'
    run(sys.executable, '-c', backend, cwd=tree)
    archive, = tmp_path.glob('mmprotune-*.tar.gz')
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / 'unpacked')
    unpacked, = (tmp_path / 'unpacked').iterdir()
    again = build_wheel(unpacked, tmp_path / 'wheel')
    assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_editable_installation_links_to_the_source(tmp_path):
    tree = copy_tree(tmp_path / 'tree')
    run('git', 'init', '-q', cwd=tree)
    run('git', 'add', '-A', cwd=tree)
    before = run('git', 'status', '--porcelain', '--untracked-files=all', cwd=tree)
    site = tmp_path / 'site'
    pip('install', '--ignore-installed', '--target', site, '--editable', tree, cwd=tree)

    # -S keeps this environment's own installation of the package out of sight.
    found = run(sys.executable, '-S', '-c', 'import site, sys; site.addsitedir(sys.argv[1]); '
                'from importlib.util import find_spec; print(find_spec("mmprotune").origin)', site,
                cwd=tmp_path).strip()
    mim = Path(found).parent / '.mim'
    assert mim == tree / 'mmprotune' / '.mim'
    (tree / 'configs' / 'added_later.py').touch()
    assert (mim / 'configs' / 'added_later.py').exists()
    assert (mim / 'tools' / 'train.py').samefile(tree / 'tools' / 'train.py')
    assert (mim / 'model-index.yml').samefile(tree / 'model-index.yml')
    (tree / 'configs' / 'added_later.py').unlink()
    assert run('git', 'status', '--porcelain', '--untracked-files=all', cwd=tree) == before


def test_building_over_an_editable_installation(tmp_path):
    """The links in `.mim` are replaced, and are not followed into a wheel."""
    tree = copy_tree(tmp_path / 'tree')
    for site in ('first', 'second'):
        pip('install', '--ignore-installed', '--target', tmp_path / site, '--editable', tree,
            cwd=tree)
    assert (tree / 'mmprotune' / '.mim' / 'configs').is_dir()
    names = build_wheel(tree, tmp_path / 'wheel').namelist()
    assert len(names) == len(set(names))
    assert names_below(names, 'mmprotune/.mim/configs/') == files_below(tree / 'configs')


@pytest.mark.parametrize('editable', [False, True])
def test_configs_stand_on_installed_ones(editable, wheel, tmp_path):
    """`mmprotune::…` as a base, from a wheel and from the linked source."""
    if editable:
        site = copy_tree(tmp_path / 'tree')
        pip('install', '--ignore-installed', '--target', tmp_path / 'site', '--editable', site,
            cwd=site)
    else:
        site = tmp_path / 'site'
        wheel.extractall(site)
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'mmprotune::_base_/protune.py'\n")
    script = f"""
import sys
sys.path.insert(0, {str(site)!r})
import mmprotune
from mmengine.config import Config
from mmengine.registry import HOOKS
assert mmprotune.__file__.startswith({str(site)!r}), mmprotune.__file__
cfg = Config.fromfile({str(config)!r})
from mmengine.registry import TRANSFORMS, init_default_scope
from mmprotune.engine import cli
init_default_scope('mmpretrain')
open('photos.py', 'w').write("_base_ = 'mmprotune::_base_/cls_data.py'")
for step in cli.load_config('photos.py').train_dataloader.dataset.pipeline:
    TRANSFORMS.build(step)
print(*(type(HOOKS.build(hook)).__name__ for hook in cfg.custom_hooks))
"""
    printed = run(sys.executable, '-W', 'ignore', '-c', script, cwd=tmp_path)
    assert printed.splitlines()[-1] == 'PromptCheckpointHook FreezeGuardHook PromptStatsHook'


def test_configs_of_a_host_under_another_distribution_name(tmp_path):
    """A fork has the module's name, not that of the distribution that MMEngine knows.

    `mmaction`, of the distribution `mmaction2`, stands in for `mmseg`, which is installed here.
    """
    package = tmp_path / 'mmaction'
    (package / '.mim' / 'configs' / 'folder').mkdir(parents=True)
    (package / '__init__.py').touch()
    (package / '.mim' / 'model-index.yml').write_text('Import: []')
    (package / '.mim' / 'configs' / 'folder' / 'stock.py').write_text('found = True')
    config = tmp_path / 'config.py'
    config.write_text("_base_ = 'mmaction::folder/stock.py'")
    script = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
from mmengine.config import Config
from mmprotune.engine import cli
assert Config.fromfile({str(config)!r}).found
print(cli.load_config('mmaction::folder/stock').found)
"""
    printed = run(sys.executable, '-W', 'ignore', '-c', script, cwd=tmp_path)
    assert printed.splitlines()[-1] == 'True'


def test_a_tree_without_its_configs_is_refused(tmp_path):
    tree = copy_tree(tmp_path / 'tree')
    shutil.rmtree(tree / 'configs')
    with pytest.raises(AssertionError, match='configs is missing beside setup.py'):
        build_wheel(tree, tmp_path / 'wheel')


def test_version_and_python(wheel_metadata):
    source = (ROOT / 'mmprotune' / 'version.py').read_text(encoding='utf-8')
    assert f"__version__ = '{wheel_metadata['Version']}'" in source
    assert wheel_metadata['Requires-Python'] in ('>=3.9,<3.14', '<3.14,>=3.9')
    assert wheel_metadata['License'] == 'Apache-2.0' or (
        wheel_metadata['License-Expression'] == 'Apache-2.0')


def links(text: str) -> list[str]:
    prose = re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r'\]\(([^)]+)\)', prose)


def test_the_description_has_no_links_to_files_that_are_not_there(wheel_metadata):
    text = wheel_metadata.get_payload(decode=True).decode('utf-8')
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert any(not link.startswith('http') for link in links(readme))
    assert links(text) and all(link.startswith('https://') for link in links(text))
    # Nothing else is lost: the code, and the words of the links.
    assert re.sub(r'!?\[([^\]]*)\]\([^)]+\)', r'\1', text).strip() == \
        re.sub(r'!?\[([^\]]*)\]\([^)]+\)', r'\1', readme).strip()


def test_links_and_addresses_once_the_source_has_one(tmp_path):
    tree = copy_tree(tmp_path / 'tree')
    with open(tree / 'CITATION.cff', 'a') as file:
        file.write("repository-code: 'https://example.org/mmprotune/'\n")
    with open(tree / 'README.md', 'a') as file:
        file.write('![a picture](docs/a.png) [above](#checkpoints)\n')
    run(sys.executable, 'setup.py', '-q', 'egg_info', '--egg-base', tmp_path, cwd=tree)
    found = email.message_from_string(
        (tmp_path / 'mmprotune.egg-info' / 'PKG-INFO').read_text(encoding='utf-8'))
    urls = dict(line.split(', ') for line in found.get_all('Project-URL'))
    assert urls['Source'] == 'https://example.org/mmprotune'
    assert urls['Changelog'] == 'https://example.org/mmprotune/blob/HEAD/CHANGELOG.md'
    text = found.get_payload()
    for link in ('[sharing](https://example.org/mmprotune/blob/HEAD/docs/sharing.md)',
                 '![a picture](https://example.org/mmprotune/raw/HEAD/docs/a.png)',
                 '[above](https://example.org/mmprotune#checkpoints)',
                 '](https://arxiv.org/abs/2207.14381)'):
        assert link in text


def test_what_an_index_shows(wheel_metadata):
    assert 'Paper, https://arxiv.org/abs/2207.14381' in wheel_metadata.get_all('Project-URL')
    assert wheel_metadata['Author'] and wheel_metadata['Keywords']
    shown = set(wheel_metadata.get_all('Classifier'))
    for minor in range(9, 14):  # as Requires-Python
        assert f'Programming Language :: Python :: 3.{minor}' in shown


def requirements_by_extra(wheel_metadata) -> dict[str, set[str]]:
    lists = {extra: set() for extra in [None, *wheel_metadata.get_all('Provides-Extra')]}
    for line in wheel_metadata.get_all('Requires-Dist'):
        requirement = Requirement(line)
        for extra in lists:
            if requirement.marker is None:
                lists[None].add(requirement.name)
                break
            if extra and requirement.marker.evaluate({'extra': extra}):
                lists[extra].add(requirement.name)
    return lists


def test_extras(wheel_metadata):
    lists = requirements_by_extra(wheel_metadata)
    assert lists[None] == {'mmengine', 'numpy', 'torch', 'torchvision', 'setuptools'}
    assert set(lists) == {None, 'det', 'seg', 'cls', 'robust', 'demo', 'export', 'hub', 'tests',
                          'docs', 'all'}
    # The site's, in the versions that tools/docs.sh installs, for the Pythons that have them.
    assert lists['docs'] == {pin.name for pin in pins('docs')
                             if pin.marker is None or pin.marker.evaluate()}
    assert 'mmdet' in lists['det']
    assert {'mmsegmentation', 'ftfy', 'regex'} <= lists['seg']
    assert 'mmpretrain' in lists['cls']
    assert lists['hub'] == {'safetensors', 'huggingface_hub'}
    assert lists['robust'] == {'imagecorruptions-imaug', 'foolbox', 'pyautoattack'}
    assert lists['demo'] == {'gradio'}
    assert lists['export'] == {'onnx', 'onnxscript', 'onnxruntime'}
    assert lists['all'] == set().union(
        *(names for extra, names in lists.items()
          if extra not in (None, 'demo', 'export', 'docs', 'all')))


def test_nothing_asks_pip_for_mmcv(wheel_metadata):
    """pip would build it in isolation, which fails, or without its ops, which is worse."""
    assert 'mmcv' not in set().union(*requirements_by_extra(wheel_metadata).values())


def pins(*names: str) -> list[Requirement]:
    lines = []
    for name in names or ('runtime', 'tests', 'build', 'mmcv'):
        lines += (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    return [Requirement(line.split(' --hash')[0]) for line in lines if line and line[0] != '#']


def test_requirements_are_pinned_once_for_each_python():
    for python in ('3.9', '3.10', '3.11', '3.12', '3.13'):
        chosen = [pin for pin in pins()
                  if pin.marker is None or pin.marker.evaluate({'python_version': python})]
        names = [pin.name for pin in chosen]
        assert len(names) == len(set(names)), f'Python {python}: a package is pinned twice'
        assert set(names) == {pin.name for pin in pins()}, f'Python {python}: a pin is missing'
        assert all(str(pin.specifier).startswith('==') for pin in [*chosen, *pins('docs')])


@pytest.mark.parametrize(('files', 'pythons'), [
    (('stacks/openmmlab', 'mmcv'), ('3.9', '3.10', '3.11')),
    (('stacks/onedl', 'stacks/onedl-mmcv'), ('3.10', '3.11', '3.12'))])
def test_stacks_are_pinned_once_for_each_of_their_pythons(files, pythons):
    listed = pins(*files)
    for python in pythons:
        chosen = [pin for pin in listed
                  if pin.marker is None or pin.marker.evaluate({'python_version': python})]
        names = [pin.name for pin in chosen]
        assert sorted(names) == sorted({pin.name for pin in listed}), f'Python {python}'
        assert all(str(pin.specifier).startswith('==') for pin in chosen)


def write_metadata(stack: str, tree: Path, out: Path) -> None:
    script = 'import sys; from setuptools import build_meta as backend; ' \
        'backend.prepare_metadata_for_build_wheel(sys.argv[1])'
    run('env', f'MMPROTUNE_STACK={stack}', sys.executable, '-c', script, out, cwd=tree)


def test_the_metadata_of_a_stack_names_its_packages_and_fits_its_pins(tree, tmp_path):
    """pip would write the original over the fork that is installed."""
    write_metadata('onedl', tree, tmp_path)
    file, = tmp_path.glob('*.dist-info/METADATA')
    required = [Requirement(line) for line in
                email.message_from_bytes(file.read_bytes()).get_all('Requires-Dist')]
    names = {requirement.name for requirement in required}
    assert not names & {'mmengine', 'mmdet', 'mmsegmentation', 'mmpretrain'}
    assert {'onedl-mmengine', 'onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain',
            'torch'} <= names
    pinned = {pin.name: str(pin.specifier)[2:] for pin in pins('stacks/onedl')}
    for requirement in required:
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_an_unknown_stack_builds_nothing(tree, tmp_path):
    with pytest.raises(AssertionError, match="MMPROTUNE_STACK: expected .* got 'conda'"):
        write_metadata('conda', tree, tmp_path)


@pytest.mark.skipif(Path(sys.prefix) != ROOT / '.venv', reason='not in the .venv of install.sh')
def test_this_environment_is_the_pinned_one():
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate():
            installed = metadata.version(pin.name)
            assert pin.specifier.contains(installed), f'{installed} is installed, pinned is {pin}'
