"""docs/zoo.py packs runs and writes its table from their model cards; the page is of such runs."""
from __future__ import annotations

import re

import pytest
from mmengine.registry import DefaultScope

from mmprotune import checkpoint
from mmprotune.errors import CheckpointError, LaunchError
from tests.test_engine.test_adapter import Run
from tests.test_site import DOCS, script

zoo = script(DOCS / 'zoo.py')


@pytest.fixture
def made(tmp_path, resnet18_file):
    """The work directory of one run, and a page with its command."""
    folder = tmp_path / 'runs' / 'flowers'
    folder.mkdir(parents=True)
    with DefaultScope.overwrite_default_scope('mmdet'):
        Run(folder, resnet18_file)
    page = tmp_path / 'zoo.md'
    page.write_text(f'before\n{zoo.BEGIN}| old |\n{zoo.END}python tools/train.py CONFIG '
                    '--work-dir work_dirs/zoo/flowers\n')
    return folder.parent, page


def test_the_table_is_what_the_cards_say(made):
    runs, page = made
    zoo.main(['--runs', str(runs), '--page', str(page)])
    packed = runs / 'packed' / 'flowers' / 'adapter.safetensors'
    info = checkpoint.inspect(packed)
    row = page.read_text().splitlines()[4].split(' | ')
    assert row[:2] == ['| flowers', 'ImageClassifier']
    assert row[2] == 'ResNet, `resnet18.pth`'
    assert row[3] == f'`{next(iter(info["fingerprints"].values()))[:8]}`'
    assert '(flowers)' in row[4] and row[5] == '2 epochs, 20 iterations'
    assert row[6] == 'top-1 61.5'
    assert row[7] == f'{packed.stat().st_size / 1e6:.1f} MB |'
    assert 'old' not in page.read_text() and page.read_text().startswith('before\n')
    before = page.read_text()
    zoo.main(['--runs', str(runs), '--page', str(page)])  # again, over what it wrote
    assert page.read_text() == before


def test_a_run_without_a_result_leaves_the_page_as_it_is(made):
    runs, page = made
    before = page.read_text()
    for log in runs.rglob('scalars.json'):
        log.unlink()
    with pytest.raises(CheckpointError, match='has none of the metrics coco/segm_mAP'):
        zoo.main(['--runs', str(runs), '--page', str(page)])
    assert page.read_text() == before
    page.write_text('no marks')
    with pytest.raises(LaunchError, match='--page: .*zoo.md has no lines'):
        zoo.main(['--runs', str(runs), '--page', str(page)])


def test_a_run_that_is_not_there(made):
    runs, page = made
    with pytest.raises(LaunchError, match='--runs: no folder .*elsewhere/flowers'):
        zoo.main(['--runs', str(runs / 'elsewhere'), '--page', str(page)])


def test_the_page_has_a_row_for_each_command():
    text = (DOCS / 'zoo.md').read_text(encoding='utf-8')
    table = text.partition(zoo.BEGIN)[2].partition(zoo.END)[0]
    rows = [line.split(' | ')[0].strip('| ') for line in table.splitlines()[2:]]
    assert rows and rows == zoo.COMMAND.findall(text)
    assert table.splitlines()[0] == f'| {" | ".join(zoo.HEAD)} |'
    assert all(re.search(r'`[0-9a-f]{8}`', line) for line in table.splitlines()[2:])
