"""tools/install.sh: what it refuses in one line, and what it does with its cache.

Nothing is downloaded or compiled here. The script runs on a copy of what it reads, with a Python
that answers for pip, PyTorch and mmcv from files in the test's folder.
"""
from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CPU_KEY = 'python{}.{}-torch2.0-mmcv2.1.0-cudaNone-cpuops-test'.format(*sys.version_info[:2])

# `state` holds `calls`, a log, and `fault`, what is to go wrong. mmcv is "installed" by copying its
# wheel to `state`/mmcv.whl, and its nms runs if that is a sound archive. `asked` says what `calls`
# leaves out: the files of requirements, the C++ standard, the stack that setup.py is told.
FAKE_PYTHON = """#!{real}
import os, shutil, sys, zipfile
from pathlib import Path

args, state = sys.argv[1:], Path({state!r})
fault = (state / 'fault').read_text() if (state / 'fault').exists() else ''

def note(line):
    with open(state / 'calls', 'a') as log:
        log.write(line + '\\n')

def asked(*words):
    with open(state / 'asked', 'a') as log:
        log.write(' '.join(words) + '\\n')

def fail(message):
    print(message)
    sys.exit(1)

def after(option):
    return args[args.index(option) + 1]

if args[:2] == ['-m', 'venv']:
    note('venv')
    Path(args[2], 'bin').mkdir(parents=True)
    Path(args[2], 'pyvenv.cfg').touch()
    shutil.copy(__file__, Path(args[2], 'bin', 'python'))
elif args[:2] == ['-m', 'pip']:
    wheels = [word for word in args if word.endswith('.whl')]
    command = next(word for word in ('install', 'download', 'wheel') if word in args)
    note('pip ' + command + (' mmcv' if wheels else ' editable' if '-e' in args else ''))
    if fault == 'no network':
        fail("WARNING: Retrying after connection broken by 'NewConnectionError'")
    if fault == 'disk full':
        fail('ERROR: [Errno 28] No space left on device')
    asked(*(word for word in args if word.endswith('.txt')))
    if command == 'download':
        source, = state.glob(after('--no-binary').replace('-', '_') + '-*.tar.gz')
        shutil.copy(source, after('--dest'))
    elif command == 'wheel':
        if fault == 'compile':
            fail('nms.cpp:1:1: error: no such thing')
        if fault == 'killed':
            os.kill(os.getpid(), 9)
        tree = Path(args[-1])
        asked((tree / 'setup.py').read_text().split("'")[-2])
        out = Path(after('--wheel-dir'))
        out.mkdir()
        with zipfile.ZipFile(out / (tree.name + '-py3-none-any.whl'), 'w') as wheel:
            wheel.writestr('mmcv/__init__.py', '')
            if fault != 'no ops':
                wheel.writestr('mmcv/_ext.cpython.so', os.environ['MMCV_WITH_OPS'])
    elif wheels:
        shutil.copy(wheels[0], state / 'mmcv.whl')
    elif 'requirements/docs.txt' in args:
        (state / 'mkdocs').touch()
    elif '-e' in args:
        asked(os.environ['MMPROTUNE_STACK'])
elif args[:2] == ['-m', 'mkdocs']:
    note(' '.join(args[1:]))
elif args[:1] == ['-c'] and 'mkdocstrings_handlers' in args[1]:
    if not (state / 'mkdocs').exists():
        fail("ModuleNotFoundError: No module named 'material'")
elif args[-2:-1] == ['-c'] and 'mmcv.ops' in args[-1]:
    if not (state / 'mmcv.whl').exists() or not zipfile.is_zipfile(state / 'mmcv.whl'):
        fail('ImportError: mmcv._ext')
elif '-c' in args and 'torch.cuda' in ' '.join(args):
    print({key!r}.replace('mmcv2.1.0', args[-1]))
elif args[:1] == ['tools/train.py']:
    note('train')
    Path(after('--work-dir')).mkdir()
    if fault != 'no checkpoint':
        Path(after('--work-dir'), 'epoch_1.pth').touch()
elif '-c' in args and 'quickstart_data' in ' '.join(args):
    note('draw')
elif '-c' in args and 'python_version()' in ' '.join(args):
    print('python 3, torch 2')
elif '-c' in args and ('import mmprotune' in args or 'import torch' in args):
    pass
elif '-c' in args and 'psutil' in ' '.join(args):
    print(1)
else:
    os.execv({real!r}, [{real!r}, *args])
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Checkout:
    """A copy of what the installation reads, in a folder of its own, with the fake Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / 'checkout'
        self.state = folder / 'state'
        self.bin = folder / 'bin'
        self.cache = folder / 'cache' / 'mmprotune'
        for path in (self.root, self.state, self.bin):
            path.mkdir(parents=True)
        shutil.copytree(ROOT / 'tools', self.root / 'tools', ignore=shutil.ignore_patterns('*.py'))
        shutil.copytree(ROOT / 'requirements', self.root / 'requirements')
        for name in ('setup.py', 'pyproject.toml'):
            shutil.copy(ROOT / name, self.root)
        self.write_mmcv("extra_compile_args['cxx'] = ['-std=c++17']\n")
        self.write_mmcv("extra_compile_args['cxx'] = ['-std=c++17']\n", 'onedl_mmcv-2.3.6')
        self.python = write_script(self.bin / 'fake-python', FAKE_PYTHON.format(
            real=sys.executable, state=str(self.state), key=CPU_KEY))
        write_script(self.bin / 'c++', '#!/bin/sh\nexit 0\n')
        self.free_disk(100)

    def write_mmcv(self, setup_py: str, name: str = 'mmcv-2.1.0') -> None:
        source = self.state / name
        source.mkdir(exist_ok=True)
        (source / 'setup.py').write_text(setup_py)
        with tarfile.open(self.state / f'{name}.tar.gz', 'w:gz') as archive:
            archive.add(source, name)

    def free_disk(self, gigabytes: int) -> None:
        write_script(self.bin / 'df', '#!/bin/sh\necho Filesystem 1024-blocks Used Available\n'
                     f'echo disk 1 1 {gigabytes * 1024 ** 2} 1% /\n')

    def fault(self, name: str) -> None:
        (self.state / 'fault').write_text(name)

    def run(self, script: str = 'install.sh', *args: str, **env) -> subprocess.CompletedProcess:
        """Runs a script; `env` adds variables, and takes away those that are None."""
        settings = {**os.environ, 'PATH': f"{self.bin}:{os.environ['PATH']}",
                    'XDG_CACHE_HOME': str(self.cache.parent), 'PYTHON': str(self.python),
                    **dict.fromkeys(('MMPROTUNE_ENV', 'MMPROTUNE_STACK', 'STACK_FOLDER',
                                     'PYTHONPATH', 'CXX', 'FORCE_CUDA')), **env}
        settings = {name: value for name, value in settings.items() if value is not None}
        return subprocess.run(['bash', str(self.root / 'tools' / script), *args], env=settings,
                              text=True, capture_output=True, stdin=subprocess.DEVNULL)

    def asked(self) -> list[str]:
        """What was asked of Python besides, since the last look."""
        log = self.state / 'asked'
        lines = [line for line in log.read_text().splitlines() if line]
        log.unlink()
        return lines

    def install(self) -> None:
        """An installation that has to succeed, its calls of Python forgotten."""
        result = self.run()
        assert result.returncode == 0, result.stderr
        self.calls()

    def calls(self) -> list[str]:
        """What was asked of Python since the last look."""
        log = self.state / 'calls'
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    @property
    def wheels(self) -> list[Path]:
        return sorted(path for path in self.cache.rglob('*') if path.is_file())


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def refusal(result: subprocess.CompletedProcess) -> str:
    """The one line a refusal consists of, whatever was reported before it."""
    assert result.returncode == 1, result.stderr
    lines = result.stderr.splitlines()
    assert lines[-1].startswith('install: error: ')
    assert sum('error:' in line for line in lines) == 1 or 'compile' in lines[-1]
    assert 'Traceback' not in result.stderr
    return lines[-1]


FRESH = ['venv', 'pip install', 'pip download', 'pip wheel', 'pip install mmcv',
         'pip install editable']


def test_from_nothing_to_a_cached_wheel(checkout):
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert checkout.calls() == FRESH
    wheel, = checkout.wheels
    assert wheel.parent.name == CPU_KEY
    assert not (checkout.root / '.venv' / 'tmp').exists()
    assert checkout.asked() == [
        'requirements/runtime.txt requirements/tests.txt requirements/build.txt',
        'requirements/mmcv.txt', '-std=c++20', 'pinned']


STACKS = [
    pytest.param('openmmlab', 'mmcv-2.1.0', 'requirements/mmcv.txt', marks=pytest.mark.skipif(
        sys.version_info >= (3, 12), reason='torch 2.1 has no wheels')),
    pytest.param('onedl', 'onedl_mmcv-2.3.6', 'requirements/stacks/onedl-mmcv.txt',
                 marks=pytest.mark.skipif(not (3, 10) <= sys.version_info < (3, 13),
                                          reason='the forks do not name this Python'))]


@pytest.mark.parametrize(('stack', 'mmcv', 'file'), STACKS)
def test_a_stack_has_a_folder_and_a_wheel_of_its_own(checkout, stack, mmcv, file):
    """mmcv's source is built as it is for their torch, so it may ask for any standard."""
    checkout.write_mmcv("extra_compile_args['cxx'] = ['-std=c++14']\n", mmcv)
    result = checkout.run(MMPROTUNE_STACK=stack)
    assert result.returncode == 0, result.stderr
    assert checkout.calls() == FRESH
    assert checkout.asked() == [
        f'requirements/stacks/{stack}.txt requirements/tests.txt requirements/build.txt',
        file, '-std=c++14', stack]
    assert (checkout.root / f'.venv-{stack}' / 'bin' / 'python').exists()
    assert not (checkout.root / '.venv').exists()
    wheel, = checkout.wheels
    assert wheel.name.startswith(f'{mmcv}-')
    assert mmcv.replace('_', '-').replace('-2', '2') in wheel.parent.name

    assert checkout.run(MMPROTUNE_STACK=stack, CXX='no-such-compiler').returncode == 0
    assert checkout.calls() == []
    # Its pins are what it is made from, too.
    with open(checkout.root / 'requirements' / 'stacks' / f'{stack}.txt', 'a') as pins:
        pins.write('tqdm==4.70.1\n')
    assert checkout.run(MMPROTUNE_STACK=stack).returncode == 0
    assert checkout.calls() == ['pip install', 'pip install editable']


def test_the_wheel_of_one_stack_is_not_taken_for_another(checkout):
    checkout.install()
    pinned, = checkout.wheels
    assert checkout.run(MMPROTUNE_STACK='onedl').returncode == 0
    assert 'pip wheel' in checkout.calls()
    assert len(checkout.wheels) == 2
    assert pinned.exists()


def test_unknown_stack(checkout):
    line = refusal(checkout.run(MMPROTUNE_STACK='conda'))
    assert "unknown stack 'conda' (MMPROTUNE_STACK): expected 'pinned'" in line
    assert "'openmmlab'" in line and "'onedl'" in line
    assert checkout.calls() == []


def test_a_stack_of_the_current_environment(checkout):
    line = refusal(checkout.run(MMPROTUNE_STACK='onedl', MMPROTUNE_ENV='current'))
    assert 'MMPROTUNE_STACK=onedl makes an environment' in line
    assert 'unset one of them' in line


@pytest.mark.parametrize(('stack', 'version'), [('openmmlab', '3.12'), ('onedl', '3.9'),
                                                ('onedl', '3.13')])
def test_python_that_a_stack_does_not_have(checkout, stack, version):
    python = write_script(checkout.bin / 'other-python', f'#!/bin/sh\necho {version}\n')
    line = refusal(checkout.run(MMPROTUNE_STACK=stack, PYTHON=str(python)))
    assert f'is Python {version}: need one of' in line


def rows(result: subprocess.CompletedProcess) -> list[list[str]]:
    """The cells of the table that tools/check_stacks.sh prints, without its head."""
    head, *lines = result.stdout.splitlines()
    assert head.split() == ['stack', 'environment', 'tests', 'training', 'seconds', 'versions']
    return [re.split(r' {2,}', line) for line in lines]


@pytest.mark.skipif(not (3, 10) <= sys.version_info < (3, 12), reason='not a Python of all stacks')
def test_stacks_are_checked_and_kept(checkout):
    """The fake hands `-m pytest` on to the real interpreter."""
    (checkout.root / 'test_it.py').write_text('def test_one(): pass\ndef test_two(): pass\n')
    arguments = ('--', '-c', os.devnull, '-k', 'two', 'test_it.py')
    result = checkout.run('check_stacks.sh', *arguments)
    assert result.returncode == 0, result.stderr
    outcome = ['ok', '1 passed, 1 deselected', 'ok']
    assert [row[:4] for row in rows(result)] == [[name, *outcome]
                                                 for name in ('pinned', 'openmmlab', 'onedl')]
    assert checkout.calls().count('train') == 3
    assert (checkout.root / '.venv').exists()
    assert {path.name for path in (checkout.cache / 'stacks').iterdir() if path.is_dir()} == {
        'openmmlab', 'onedl'}
    assert '1 passed' in (checkout.root / 'work_dirs/stacks/onedl/tests.log').read_text()

    assert checkout.run('check_stacks.sh', 'onedl', *arguments).returncode == 0
    assert checkout.calls() == ['draw', 'train']


@pytest.mark.skipif(not (3, 10) <= sys.version_info < (3, 13), reason='not a Python of the forks')
def test_what_fails_on_a_stack_is_in_the_table(checkout):
    (checkout.root / 'test_it.py').write_text('def test_one(): assert False\n')
    arguments = ('onedl', '--', '-c', os.devnull, 'test_it.py')
    result = checkout.run('check_stacks.sh', *arguments)
    assert result.returncode == 1
    assert rows(result)[0][:4] == ['onedl', 'ok', '1 failed', 'ok']
    checkout.fault('no checkpoint')
    assert rows(checkout.run('check_stacks.sh', *arguments))[0][:4] == [
        'onedl', 'ok', '1 failed', 'failed']
    with open(checkout.root / 'requirements' / 'tests.txt', 'a') as file:
        file.write('tqdm==4.70.1\n')
    checkout.fault('no network')
    result = checkout.run('check_stacks.sh', *arguments)
    assert result.returncode == 1
    assert rows(result)[0][:4] == ['onedl', 'failed', '-', '-']
    assert 'no network' in result.stderr


def test_an_unknown_stack_is_refused_before_any_is_made(checkout):
    line = refusal(checkout.run('check_stacks.sh', 'onedl', 'conda'))
    assert "unknown stack 'conda'" in line
    assert checkout.calls() == []


def test_second_run_asks_nothing_of_pip(checkout):
    checkout.install()
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == [f'install: ready: {checkout.root}/.venv/bin/python']
    assert checkout.calls() == []


def test_another_checkout_takes_the_wheel_from_the_cache_without_a_compiler(checkout, tmp_path):
    checkout.install()
    other = Checkout(tmp_path / 'other')
    other.cache = checkout.cache
    result = other.run(CXX='no-such-compiler')
    assert result.returncode == 0, result.stderr
    assert other.calls() == ['venv', 'pip install', 'pip install mmcv', 'pip install editable']


def test_changed_requirements_are_installed_and_mmcv_is_kept(checkout):
    checkout.install()
    with open(checkout.root / 'requirements' / 'tests.txt', 'a') as file:
        file.write('pytest-timeout==2.4.0\n')
    assert checkout.run().returncode == 0
    assert checkout.calls() == ['pip install', 'pip install editable']


def test_mmcv_that_stopped_working_is_repaired(checkout):
    checkout.install()
    (checkout.state / 'mmcv.whl').unlink()
    result = checkout.run()
    assert 'does not run any more' in result.stderr
    assert 'pip install mmcv' in checkout.calls()
    assert result.returncode == 0


def test_a_damaged_wheel_in_the_cache_is_built_anew(checkout):
    damaged = checkout.cache / CPU_KEY / 'mmcv-2.1.0-py3-none-any.whl'
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b'cut off')
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert 'pip wheel' in checkout.calls()
    assert zipfile.is_zipfile(damaged)


def test_an_interrupted_installation_is_taken_up_again(checkout):
    checkout.fault('compile')
    refusal(checkout.run())
    checkout.calls()
    checkout.fault('')
    assert checkout.run().returncode == 0
    assert checkout.calls() == FRESH[1:]


def test_a_broken_venv_is_made_anew(checkout):
    checkout.install()
    (checkout.root / '.venv' / 'bin' / 'python').unlink()
    result = checkout.run()
    assert result.returncode == 0, result.stderr
    assert checkout.calls()[0] == 'venv'


def test_a_home_that_cannot_be_written_is_no_obstacle(checkout, tmp_path):
    (tmp_path / 'home').write_text('a file where a folder should be')
    result = checkout.run(XDG_CACHE_HOME=None, HOME=str(tmp_path / 'home'))
    assert result.returncode == 0, result.stderr
    assert list((checkout.root / '.venv' / 'cache').rglob('mmcv-*.whl'))


@pytest.mark.parametrize(('fault', 'message'), [
    ('no network', 'no network: pip cannot reach its package index'),
    ('disk full', 'no space left on the disk'),
    ('compile', 'mmcv does not compile: nms.cpp:1:1: error: no such thing'),
    ('killed', 'mmcv does not compile: it was killed'),
    ('no ops', 'mmcv was built without its ops'),
])
def test_what_goes_wrong_is_said_in_one_line_and_nothing_is_cached(checkout, fault, message):
    checkout.fault(fault)
    assert message in refusal(checkout.run())
    assert checkout.wheels == []


def test_unknown_environment(checkout):
    line = refusal(checkout.run(MMPROTUNE_ENV='conda'))
    assert "unknown MMPROTUNE_ENV 'conda'" in line
    assert "'current'" in line


@pytest.mark.parametrize('version', ['3.8', '3.14'])
def test_unsuitable_python(checkout, version):
    python = write_script(checkout.bin / 'other-python', f'#!/bin/sh\necho {version}\n')
    line = refusal(checkout.run(PYTHON=str(python)))
    assert f'is Python {version}: need one of 3.9' in line


def test_no_python_that_runs(checkout):
    assert 'does not run' in refusal(checkout.run(PYTHON='no-such-python'))


def test_only_an_old_python_on_the_path(checkout):
    for name in ('python3', 'python3.9', 'python3.10', 'python3.11', 'python3.12', 'python3.13'):
        write_script(checkout.bin / name, '#!/bin/sh\necho 3.7\n')
    assert 'found python3, which is 3.7' in refusal(checkout.run(PYTHON=None))


def test_a_name_on_the_path_that_does_not_run_is_passed_over(checkout):
    """Version managers put such names on the path for versions that are not switched on."""
    write_script(checkout.bin / 'python3.11', '#!/bin/sh\nexit 127\n')
    write_script(checkout.bin / 'python3.10', f'#!/bin/sh\nexec {checkout.python} "$@"\n')
    result = checkout.run(PYTHON=None)
    assert result.returncode == 0, result.stderr


def test_python_that_is_not_the_one_of_the_venv(checkout):
    checkout.install()
    other = '3.9' if sys.version_info[:2] != (3, 9) else '3.10'
    python = write_script(checkout.bin / 'other-python', f'#!/bin/sh\necho {other}\n')
    assert f'is Python {other}, but .venv has' in refusal(checkout.run(PYTHON=str(python)))


def test_too_little_disk(checkout):
    checkout.free_disk(2)
    assert 'has 2 GB free: the first installation needs' in refusal(checkout.run())
    assert not (checkout.root / '.venv').exists()


def test_no_compiler_is_said_before_anything_is_downloaded(checkout):
    assert "no C++20 compiler ('no-such-compiler' cannot)" in refusal(
        checkout.run(CXX='no-such-compiler'))
    assert checkout.calls() == []


def test_a_folder_in_the_place_of_the_venv_is_left_alone(checkout):
    kept = checkout.root / '.venv' / 'kept'
    kept.parent.mkdir()
    kept.touch()
    assert 'is no virtual environment' in refusal(checkout.run())
    assert kept.exists()


def test_another_mmcv_is_not_patched_blindly(checkout):
    checkout.write_mmcv("extra_compile_args['cxx'] = ['-std=c++23']\n")
    assert 'does not ask for -std=c++17' in refusal(checkout.run())


def test_arguments_are_refused(checkout):
    assert "unexpected '--help'" in refusal(checkout.run('install.sh', '--help'))


def test_tests_get_their_arguments(checkout):
    """The fake hands `-m pytest` on to the real interpreter."""
    (checkout.root / 'test_it.py').write_text('def test_one(): pass\ndef test_two(): pass\n')
    result = checkout.run('run_tests.sh', '-c', os.devnull, '-k', 'two', 'test_it.py')
    assert result.returncode == 0, result.stdout + result.stderr
    assert '1 passed' in result.stdout


def test_the_site_installs_what_it_takes_once(checkout):
    checkout.install()
    for calls in (['pip install', 'mkdocs build --strict'], ['mkdocs build --strict']):
        result = checkout.run('docs.sh')
        assert result.returncode == 0, result.stderr
        assert checkout.calls() == calls
    assert checkout.run('docs.sh', 'serve').returncode == 0
    assert checkout.calls() == ['mkdocs serve --strict']
    assert "unexpected 'publish': expected build or serve" in refusal(
        checkout.run('docs.sh', 'publish'))


def test_current_environment_is_used_as_it_is(checkout):
    """The real interpreter and libraries, this time: the ones these tests run in."""
    shutil.copytree(ROOT / 'mmprotune', checkout.root / 'mmprotune',
                    ignore=shutil.ignore_patterns('.mim', '__pycache__'))
    result = checkout.run(MMPROTUNE_ENV='current', PYTHON=sys.executable)
    assert result.returncode == 0, result.stderr
    assert f'using {sys.executable} as it is' in result.stderr
    assert not (checkout.root / '.venv').exists()


def test_current_environment_that_lacks_something(checkout):
    bare = write_script(checkout.bin / 'bare', f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    line = refusal(checkout.run(MMPROTUNE_ENV='current', PYTHON=str(bare)))
    for name in ('torch', 'mmengine', 'mmcv.ops', 'mmdet'):
        assert f"{name} (No module named '{name.split('.')[0]}')" in line
