"""What is said of the versions that are installed when the package is imported."""
from __future__ import annotations

import warnings
from importlib import metadata

import pytest

from mmprotune import version

OPENMMLAB = {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'}
ONEDL = {'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation',
         'onedl-mmpretrain'}


@pytest.fixture
def install(monkeypatch):
    def only(names: set) -> None:
        def found(name: str) -> str:
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return '1.0'
        monkeypatch.setattr(metadata, 'version', found)
    return only


@pytest.mark.parametrize('stack', [OPENMMLAB, ONEDL, {'mmengine', 'onedl-mmcv'}])
def test_one_stack_passes_in_silence(install, stack):
    install(stack)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        version.check_environment()


def test_a_fork_over_its_original_is_warned_of(install):
    install(OPENMMLAB | {'onedl-mmdetection', 'onedl-mmsegmentation'})
    with pytest.warns(UserWarning, match='both installed') as caught:
        version.check_environment()
    assert [str(warning.message).partition(' are ')[0] for warning in caught] == [
        'mmdet and onedl-mmdetection', 'mmsegmentation and onedl-mmsegmentation']


@pytest.mark.parametrize(('name', 'attribute'), [('torch', 'MINIMUM_TORCH'),
                                                 ('mmengine', 'MINIMUM_MMENGINE')])
def test_what_is_too_old_is_refused(monkeypatch, name, attribute):
    monkeypatch.setattr(version, attribute, '99.0')
    with pytest.raises(ImportError, match=f'mmprotune needs {name}>=99.0, found {name}=='):
        version.check_environment()
