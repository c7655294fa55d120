"""What the tests of the checks share."""
from __future__ import annotations

import resource
from pathlib import Path

import pytest

from mmprotune.matrix import configs
from mmprotune.matrix.limits import Limits, check_all

SMALL = 'mmdet::yolox/yolox_nano_8xb8-300e_coco.py'


def held() -> float:
    """Address space of this process in GB: a forked one starts with it."""
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    return pages * resource.getpagesize() / 1e9


def check(name: str, insert: str | None = None, **limits) -> dict:
    # Beside other tests this process has grown far beyond what the tool itself holds.
    limits.setdefault('memory', 9 + held())
    result, = check_all(configs.runs_of([name]), limits=Limits(**limits), insert=insert)
    return result


def result_of(name: str, verdict: str = 'pass', file: str = 'init_cfg', reason: str = '') -> dict:
    return dict(key=name, configs=[f'mmdet::{name}.py'], verdict=verdict, reason=reason, file=file,
                seconds=1.5)


def ship(folder: Path, monkeypatch) -> list[str]:
    """Lets a library called mmdet ship five configs, and returns their names."""
    files = dict(
        a="model = dict(type='A', backbone=dict(type='B'))", b='x = 1', c='x =',
        d="_base_ = 'a.py'\ntrain_cfg = dict(max_epochs=3)",
        e="_base_ = 'a.py'\nload_from = 'file.pth'")
    (folder / '_base_').mkdir()
    (folder / '_base_' / 'f.py').write_text(files['a'])
    for name, text in files.items():
        (folder / f'{name}.py').write_text(text)
    monkeypatch.setattr(configs, 'root', lambda library: folder)
    monkeypatch.setattr(configs, 'LIBRARIES', ('mmdet', ))
    return [f'mmdet::{name}.py' for name in files]


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> list[str]:
    return ship(tmp_path, monkeypatch)
