"""The site of docs/: what scripts make of it is current, and it builds without a warning."""
from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmprotune.errors

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
MKDOCS = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None
        for name in ('mkdocs', 'material', 'mkdocstrings_handlers')),
    reason='MkDocs is missing: bash tools/docs.sh installs it (requirements/docs.txt)')


def script(path: Path):
    spec = importlib.util.spec_from_file_location(f'docs_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_as_drawn():
    draw = script(DOCS / 'figures' / 'draw.py')
    drawn = {f'{figure.__name__}.svg': figure().svg() for figure in draw.FIGURES}
    assert {path.name for path in (DOCS / 'figures').glob('*.svg')} == set(drawn)
    old = [name for name, text in drawn.items()
           if (DOCS / 'figures' / name).read_text(encoding='utf-8') != text]
    assert old == [], 'run python docs/figures/draw.py'


@pytest.mark.skipif(sys.version_info[:2] not in ((3, 11), (3, 12)),
                    reason='argparse prints help in another form')
def test_command_lines_are_as_printed():
    page = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', 'import runpy, sys; sys.stdout.reconfigure('
         'encoding="utf-8"); print(runpy.run_path("docs/site/commands.py")["page"](), end="")'],
        cwd=ROOT, capture_output=True, text=True, encoding='utf-8', check=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)}).stdout
    assert (DOCS / 'commands.md').read_text(encoding='utf-8') == page, (
        'run python docs/site/commands.py')


def test_every_tool_has_its_help_on_the_page():
    page = (DOCS / 'commands.md').read_text(encoding='utf-8')
    with_help = [path.relative_to(ROOT).as_posix() for path in (ROOT / 'tools').rglob('*.py')
                 if 'ArgumentParser(' in path.read_text(encoding='utf-8')]
    # What the quickstart starts itself.
    with_help.remove('tools/quickstart_pretrain.py')
    assert with_help
    assert [name for name in with_help if f'\n## {name}\n' not in page] == []


def test_every_page_is_in_the_navigation():
    """Or waits there as a comment."""
    nav = (ROOT / 'mkdocs.yml').read_text(encoding='utf-8').partition('\nnav:\n')[2]
    named = set(re.findall(r'[\w/]+\.(?:md|ipynb)', nav))
    pages = {path.relative_to(DOCS).as_posix() for kind in ('md', 'ipynb')
             for path in DOCS.rglob(f'*.{kind}')}
    assert pages - named == set()


def test_links_of_the_readme():
    """The site's own are looked at when it is built."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    links = [link for link in re.findall(r'\]\(([^)\s#]+)', text) if '://' not in link]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_has_the_share_of_stock_configs_that_was_measured():
    share = re.compile(r'(\d+) of (\d+) configs whose stock model runs here')
    measured = share.search((DOCS / 'configs.md').read_text(encoding='utf-8'))
    said = share.search((ROOT / 'README.md').read_text(encoding='utf-8'))
    assert measured and said
    assert said.groups() == measured.groups(), 'write the measured figures into README.md'


def test_errors_in_the_help_for_trouble_exist():
    page = (DOCS / 'troubleshooting.md').read_text(encoding='utf-8')
    own = set(re.findall(r'`(\w+(?:Error|Changed|Mismatch|Checkpoint|Fit))`', page))
    assert own - {'ModuleNotFoundError', 'KeyError'}
    assert [name for name in own - {'ModuleNotFoundError', 'KeyError'}
            if not hasattr(mmprotune.errors, name)] == []


@MKDOCS
def test_links_lead_to_pages():
    hooks = script(DOCS / 'site' / 'hooks.py')

    def moved(text: str, page: str) -> str:
        return hooks.LINK.sub(lambda link: hooks.moved(link, page), text)

    assert moved('[a](../README.md)', 'lean.md') == '[a](index.md)'
    assert moved('[a](../../configs/README.md#data)', 'results/x.md') == (
        '[a](../shipped_configs.md#data)')
    assert moved('[a](docs/results/README.md)', 'CONTRIBUTING.md') == '[a](results/README.md)'
    assert moved('[a](fpn_r18_full_camvid.py)', 'shipped_configs.md') == 'a'
    for same in ('[a](no_such_page.txt)', '[a](https://arxiv.org/abs/2207.14381)', '[a](#here)',
                 '![a](figures/method.svg)', '[a](lean.md#what-is-kept)'):
        assert moved(same, 'concepts.md') == same


def build(tmp_path: Path, page: str = '') -> subprocess.CompletedProcess:
    """Builds the site of a copy of what it is made of, with a page more in it."""
    tree = tmp_path / 'tree'
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ('docs', 'work_dirs', '.git', '.venv'):
            (tree / path.name).symlink_to(path)
    shutil.copytree(DOCS, tree / 'docs')
    (tree / 'docs' / 'troubleshooting.md').write_text(page or (
        DOCS / 'troubleshooting.md').read_text(encoding='utf-8'), encoding='utf-8')
    return subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path / 'site')],
        cwd=tree, capture_output=True, text=True, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})


@MKDOCS
def test_the_site_builds_without_a_warning(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / 'site' / 'api.html').read_text(encoding='utf-8')
    assert 'backbone_dtype' in page
    assert not re.search(r':(?:class|func|meth|mod|math):', page)


@MKDOCS
def test_a_dead_link_is_told(tmp_path):
    done = build(tmp_path, '# A page\n\n[there](no_such_page.md), [here](lean.md#no-such-anchor)\n')
    assert done.returncode != 0
    assert "'no_such_page.md'" in done.stderr
    assert 'no-such-anchor' in done.stderr
