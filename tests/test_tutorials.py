"""The notebooks of docs/tutorials: bare in git, and they run as they stand."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'docs' / 'tutorials').glob('*.ipynb'))
notebooks = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    content = json.loads(path.read_text(encoding='utf-8'))
    return [cell for cell in content['cells'] if cell['cell_type'] == kind]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ['detection', 'segmentation', 'trunk']


@notebooks
def test_nothing_that_a_run_left_is_in_git(path):
    content = json.loads(path.read_text(encoding='utf-8'))
    assert (content['nbformat'], content['nbformat_minor']) == (4, 5)
    assert set(content['metadata']) == {'kernelspec', 'language_info'}
    code = cells(path, 'code')
    assert code
    assert [cell for cell in code if cell['outputs'] or cell['execution_count'] is not None] == []
    ids = [cell['id'] for cell in content['cells']]
    assert len(set(ids)) == len(ids)
    assert all(not cell['metadata'] for cell in content['cells'])


@notebooks
def test_cells_are_plain_python(path):
    """No magic of IPython's, so that they run anywhere, below too."""
    for cell in cells(path, 'code'):
        compile(''.join(cell['source']), str(path), 'exec')


@pytest.mark.slow
@notebooks
def test_the_notebook_runs(path, tmp_path):
    """Its cells one after the other, in a process and a folder of their own."""
    script = tmp_path / f'{path.stem}.py'
    script.write_text('\n\n'.join(''.join(cell['source']) for cell in cells(path, 'code')),
                      encoding='utf-8')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', str(script)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'Agg'}, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
