import os
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmprotune import checkpoint
from mmprotune.engine import training
from mmprotune.engine.hooks import PromptCheckpointHook
from mmprotune.errors import (
    IncompleteCheckpoint,
    UnreadableCheckpoint,
)

from .models import prompted_config, save_model, trained_model


def _write(path, **content):
    torch.save(dict(meta=dict(epoch=1, iter=2), state_dict=dict(a=torch.zeros(1)), **content), path)
    return str(path)


def test_checkpoints_without_an_optimizer_are_not_overwritten(tmp_path):
    path = _write(tmp_path / 'epoch_1.pth')
    before = (tmp_path / 'epoch_1.pth').read_bytes()
    cfg = Config(dict(model={}, work_dir=str(tmp_path), load_from='elsewhere.pth'))
    runner = SimpleNamespace(_resume=True, _load_from=None, work_dir=str(tmp_path), hooks=[],
                             cfg=cfg)
    for attempt in (lambda: training.set_resume(cfg, 'auto'),
                    lambda: PromptCheckpointHook().before_run(runner)):
        with pytest.raises(IncompleteCheckpoint, match=f'{path}: it holds no optimizer.*another '
                                                       f'work_dir, with load_from={path}'):
            attempt()
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before
    assert cfg.load_from == 'elsewhere.pth'


def test_an_older_one_with_an_optimizer_is_no_way_out(tmp_path):
    old = _write(tmp_path / 'epoch_1.pth', optimizer={})
    os.utime(old, (1, 1))
    new = _write(tmp_path / 'epoch_2.pth')
    with pytest.raises(IncompleteCheckpoint, match='epoch_2.pth: it holds no optimizer'):
        checkpoint.newest(tmp_path)
    os.utime(new, (0, 0))
    assert checkpoint.newest(tmp_path) == old
    # Files of another origin, and the best ones, are nobody's to resume from.
    for name in ('resnet50.pth', 'epoch_1-0a1b2c3.pth', 'best_mAP_epoch_1.pth'):
        _write(tmp_path / name)
    assert checkpoint.newest(tmp_path) == old
    os.remove(old), os.remove(new)
    assert checkpoint.newest(tmp_path) is None


def test_the_noted_checkpoint_has_any_name(tmp_path):
    _write(tmp_path / 'model7.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'model7.pth'))
    with pytest.raises(IncompleteCheckpoint, match='model7.pth: it holds no optimizer'):
        checkpoint.newest(tmp_path)


def test_a_list_is_no_checkpoint_to_resume_from(tmp_path):
    torch.save([1, 2], tmp_path / 'epoch_1.pth')
    with pytest.raises(UnreadableCheckpoint, match='expected a dict'):
        checkpoint.newest(tmp_path)


def test_resuming_needs_an_optimizer_without_strict_too(file, tmp_path):
    model = trained_model(prompted_config(file))
    content = torch.load(save_model(model, tmp_path / 'epoch_1.pth', epoch=1, iter=2))
    runner = SimpleNamespace(_resume=True, _load_from='epoch_1.pth', model=model)
    with pytest.raises(IncompleteCheckpoint, match='no optimizer and no message_hub'):
        PromptCheckpointHook(strict=False).after_load_checkpoint(runner, content)
