"""What the documentation shows works: configs build and train, commands exist as written."""
from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import pathlib
import re
import shlex
import subprocess

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

from mmprotune.config_nodes import without_pretrained
from mmprotune.engine import cli
from mmprotune.engine.config import protune
from mmprotune.engine.runner import build_runner
from mmprotune.testing.noise_batch import noise_item
from tests.test_configs import ROOT, SIZE, make_small

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'configs/README.md',
         *sorted((ROOT / 'docs').rglob('*.md'))]
# What a reader puts in place of these, here.
PLACES = {'mmprotune::': f'{ROOT}/configs/', 'path/to/configs': str(ROOT / 'configs')}


def snippets(language: str) -> list:
    """The fenced blocks of a language on all pages, as test parameters named page:line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding='utf-8')
        for match in re.finditer(rf'^```{language}\n(.*?)^```$', text, re.DOTALL | re.MULTILINE):
            line = text[:match.start()].count('\n') + 1
            found.append(pytest.param(
                match[1], id=f'{page.relative_to(ROOT)}:{line}'))
    return found


def test_the_pages_have_snippets():
    """The patterns above still find what they are for."""
    assert len(snippets('python')) >= 5 and len(snippets('bash')) >= 5


@pytest.mark.parametrize('code', snippets('python'))
def test_config_snippets_train_prompts_and_head(code, tmp_path):
    for place, here in PLACES.items():
        code = code.replace(place, here)
    if '_base_ =' not in code:  # a piece of a config or of a program
        ast.parse(code)
        return
    # A page's snippet stands where its own configs do.
    for path in (ROOT / 'configs').iterdir():
        (tmp_path / path.name).symlink_to(path)
    file = tmp_path / 'of_the_documentation.py'
    file.write_text(code)
    cfg = cli.load_config(str(file))
    if 'PromptedBackbone' not in str(cfg.model.backbone.type):
        pytest.skip('only inherits hooks')
    cfg = without_pretrained(cfg)
    assert cfg.model.backbone['freeze'] == 'all'
    assert [hook['type'].partition('.')[0] for hook in cfg.custom_hooks][:3] == ['mmprotune'] * 3
    make_small(cfg)
    cfg.launcher, cfg.work_dir = 'none', str(tmp_path / 'run')
    cfg.experiment_name = file.stem
    runner = build_runner(cfg)
    runner.model.init_weights()
    optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    rng = np.random.default_rng(0)
    items = [noise_item(cfg, SIZE, rng) for _ in range(2)]
    log = runner.model.train().train_step(pseudo_collate(items), optim_wrapper)
    assert torch.isfinite(log['loss'])
    stepped = {name for name, parameter in runner.model.named_parameters()
               if parameter in optim_wrapper.optimizer.state}
    assert any(name.startswith('backbone.prompts.') for name in stepped)
    assert any(not name.startswith('backbone.') for name in stepped)
    assert not any(name.startswith('backbone.backbone.') for name in stepped)


# --- commands --------------------------------------------------------------------------------


@functools.cache
def tool(path: str):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem + '_docs', ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def helps(path: str, words: list[str], capsys) -> str:
    """What the tool prints for --help, of the subcommand that the words begin with if any."""
    text = ''
    for argv in ([], words[:1] if words and words[0].isidentifier() else []):
        with pytest.raises(SystemExit) as stop:
            tool(path).main([*argv, '--help'])
        assert stop.value.code == 0, f'{path} {argv}'
        text += capsys.readouterr().out
    return text


def commands(text: str) -> list[list[str]]:
    """The commands of a shell snippet, as words; what connects them and comments taken off."""
    found = []
    for line in text.replace('\\\n', ' ').splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=';&|')
        lexer.whitespace_split, lexer.commenters = True, '#'
        words: list[str] = []
        for word in [*lexer, ';']:
            if set(word) <= set(';&|'):
                found.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in found if words]


@pytest.mark.parametrize('text', snippets('(?:bash|console|shell|sh)'))
def test_shell_snippets(text, capsys):
    assert subprocess.run(['bash', '-n'], input=text, text=True, check=False).returncode == 0
    for words in commands(text):
        while words and (words[0] in ('do', 'then') or re.match(r'\w+=', words[0])):
            words = words[1:]
        if words[:1] == ['bash'] or words[:2] == ['python', '-m']:
            named = [w for w in words[1:] if re.match(r'(tools|tests)/', w)]
            assert all((ROOT / name.partition('::')[0]).exists() for name in named), words
        elif words[:1] == ['python'] and words[1].startswith('tools/'):
            check_tool(words[1], words[2:], capsys)
        for config in re.findall(r'(?<![\w/])configs/[\w.-]+\.py\b', ' '.join(words)):
            assert (ROOT / config).is_file(), config


def check_tool(path: str, words: list[str], capsys) -> None:
    text = helps(path, words, capsys)
    for flag in (w for w in words if w.startswith('--')):
        assert re.search(rf'(?<![\w-]){re.escape(flag.partition("=")[0])}(?![\w-])', text), (
            f'{path} has no {flag}')
    if '--cfg-options' in words:
        options = words[words.index('--cfg-options') + 1:]
        # A reader's own is named my_….
        config = next((w for w in words if re.fullmatch(r'(?!my_)[^$]+\.py', w)), None)
        if config is not None:
            cfg = cli.load_config(str(ROOT / config) if '::' not in config else config)
            check_options(protune(cfg) if '--protune' in words else cfg,
                          [w for w in options if '=' in w and not w.startswith('--')])


def check_options(cfg: Config, options: list[str]) -> None:
    """Each key is there, or at least its holder; some holders may be new."""
    runner = inspect.signature(Runner.__init__).parameters
    for option in options:
        *holders, _ = option.partition('=')[0].split('.')
        if not holders or holders[0] in ('default_hooks', 'optim_wrapper') or (
                holders[0] in runner and holders[0] not in cfg):
            continue
        node = cfg
        for name in holders:
            try:
                node = node[int(name)] if isinstance(node, (list, tuple)) else node[name]
            except (KeyError, IndexError):
                pytest.fail(f'--cfg-options {option}: the config has no {name}')
            if node is None:
                break


def test_the_checks_can_fail(capsys):
    with pytest.raises(AssertionError, match='has no --no-such-flag'):
        check_tool('tools/train.py', ['configs/x_$Y.py', '--no-such-flag'], capsys)
    cfg = Config(dict(model=dict(backbone=dict(depth=1), heads=[dict(a=1)])))
    check_options(cfg, ['model.backbone.depth=2', 'model.heads.0.a=2', 'model.new=1'])
    for wrong in ('model.backbne.depth=2', 'model.heads.1.a=2'):
        with pytest.raises(pytest.fail.Exception, match='the config has no'):
            check_options(cfg, [wrong])
    assert commands('A=1 python x.py \\\n  --a "b c"  # d\ncd e && f; g') == [
        ['A=1', 'python', 'x.py', '--a', 'b c'], ['cd', 'e'], ['f'], ['g']]


# --- the forms and the workflow of the source's host ------------------------------------------


def test_the_workflow_runs_what_a_change_has_to_pass():
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    commands = [step['run'] for job in workflow['jobs'].values() for step in job['steps']
                if 'run' in step]
    assert commands == ['bash .ci/run'] and (ROOT / '.ci/run').is_file()


def test_issue_forms_name_what_there_is():
    forms = [path for path in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml')
             if path.name != 'config.yml']
    assert forms
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form['name'] and form['description']
        ids = [part['id'] for part in form['body'] if part['type'] != 'markdown']
        assert len(ids) == len(set(ids)) and all('attributes' in part for part in form['body'])
        assert any((part.get('validations') or {}).get('required') for part in form['body'])
        for named in re.findall(r'[\w/]+\.(?:py|md)\b', path.read_text()):
            assert (ROOT / named).is_file(), named
