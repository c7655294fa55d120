"""What MkDocs needs besides mkdocs.yml, so that pages stay readable where they are in the tree.

Pages outside ``docs/`` and notebooks become pages of the site, and links that lead to files of the
repository lead to the pages made of them; to a file that is no page (a config, say) they are text.
"""
from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Path in the repository: path in the site.
OUTSIDE = {
    'CHANGELOG.md': 'CHANGELOG.md',
    'CONTRIBUTING.md': 'CONTRIBUTING.md',
    'SECURITY.md': 'SECURITY.md',
    'configs/README.md': 'shipped_configs.md',
}
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)')
# What docstrings have of Sphinx's roles and of LaTeX, in the HTML made of them.
ROLE = re.compile(r':(?:class|func|meth|mod):<code>(?:~[\w.]*\.)?([^<]*)</code>')
MATH = re.compile(r':math:<code>([^<]*)</code>|\.\. math::\s*([^<]*)')
SIGNS = {
    r'\\hat (\w)': '\\1\N{COMBINING CIRCUMFLEX ACCENT}', r'\\mathrm\{(\w+)\}': r'\1',
    r'\\cdot': '·', r'\\sigma': 'σ', r'\\gamma': 'γ', r'\\beta': 'β', r'\\tilde (\w)': r'\1~',
    r'\\q?quad': ' ', r'\\[,!]': ' '}
FENCE = re.compile(r'(^```.*?^```$)', re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not Markdown below ``docs/``."""
    for place, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    for notebook in sorted((ROOT / 'docs').rglob('*.ipynb')):
        uri = notebook.relative_to(ROOT / 'docs').as_posix()
        if files.get_file_from_path(uri) is not None:
            files.remove(files.get_file_from_path(uri))
        files.append(File.generated(config, page_of(uri), content=markdown_of(notebook)))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = _pages(config.nav)
    return config


def _pages(node):
    """The navigation with the pages of notebooks in place of them."""
    if isinstance(node, dict):
        return {key: _pages(value) for key, value in node.items()}
    return [_pages(child) for child in node] if isinstance(node, list) else page_of(node)


def page_of(uri: str) -> str:
    return uri[:-len('.ipynb')] + '.md' if uri.endswith('.ipynb') else uri


def markdown_of(notebook: Path) -> str:
    """A notebook's cells as Markdown, code in fences."""
    note = f'*This page is the notebook `docs/{notebook.relative_to(ROOT / "docs").as_posix()}`.*'
    cells = []
    for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        cells.append(f'```python\n{source}\n```' if cell['cell_type'] == 'code' else source)
    return '\n\n'.join([*cells[:1], note, *cells[1:]]) + '\n'


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: moved(link, page.file.src_uri), part)
                  for part in parts[::2]]
    return ''.join(parts)


def moved(link: re.Match, uri: str) -> str:
    """A link as it is right in the site; what leads to no file at all stays, for strict mode."""
    mark, text, address = link.groups()
    path, hash_, anchor = address.partition('#')
    if '://' in path or not path or path.startswith('mailto:'):
        return link[0]
    place = next((k for k, v in OUTSIDE.items() if v == uri), f'docs/{uri}')
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
    if target == 'README.md':
        target = 'docs/index.md'
    if target in OUTSIDE:
        found = OUTSIDE[target]
    elif target.startswith('docs/') and (ROOT / target).suffix in ('.md', '.png', '.svg', '.ipynb'):
        found = page_of(target[len('docs/'):])
    elif (ROOT / target).exists():
        return text
    else:
        return link[0]
    here = posixpath.dirname(uri) or '.'
    return f'{mark}[{text}]({posixpath.relpath(found, here)}{hash_}{anchor})'


def on_page_content(html: str, **_) -> str:
    """Roles and formulas of docstrings as plain text; no script for them is asked of a server."""
    return MATH.sub(lambda found: f'<code>{formula(found[1] or found[2])}</code>',
                    ROLE.sub(r'<code>\1</code>', html))


def formula(latex: str) -> str:
    for pattern, sign in SIGNS.items():
        latex = re.sub(pattern, sign, latex)
    return re.sub(r'\s+', ' ', latex).strip()
