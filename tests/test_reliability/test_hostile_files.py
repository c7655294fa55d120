"""Two hundred broken checkpoints: an error of our own that names the file, or an intact load."""
import os
import re
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from mmprotune import checkpoint
from mmprotune.checkpoints.convert import build_model
from mmprotune.engine import cli
from mmprotune.errors import CheckpointError
from tests.conftest import wake
from tests.test_tools.conftest import load_tool

from . import hostile

tool = load_tool('prompt_checkpoint.py')


@pytest.fixture(scope='module')
def corpus(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    found = hostile.variants(Path(trained[2]).read_bytes(), folder / 'canary')
    for variant in found:
        (folder / f'{variant.name}.pth').write_bytes(variant.content)
    return folder, found


@pytest.fixture(autouse=True)
def _no_code_ran(corpus):
    hostile.FIRED.clear()
    yield
    assert not hostile.FIRED
    assert not (corpus[0] / 'canary').exists()


def _one_of_each(found):
    return {variant.kind: variant for variant in reversed(found)}.values()


def _state(model):
    return {k: v.clone() for k, v in checkpoint.full_state_dict(model).items()}


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def _refusal(model, file):
    """The message with which a file is refused; None when it loads. Other errors pass."""
    try:
        checkpoint.load(model, file)
    except CheckpointError as error:
        return str(error)
    return None


def test_the_corpus_is_what_it_says(corpus, trained):
    folder, found = corpus
    assert len(found) == 200
    assert {v.kind for v in found} == {
        'truncated', 'flipped', 'shape', 'missing', 'extra', 'nan', 'fingerprint', 'classes',
        'type', 'content', 'bomb', 'program', 'other'}
    assert sum(v.kind == 'flipped' for v in found) >= 20
    again = hostile.variants(Path(trained[2]).read_bytes(), folder / 'canary')
    assert [v.content for v in found if v.kind in ('flipped', 'truncated')] == \
        [v.content for v in again if v.kind in ('flipped', 'truncated')]
    # The hostile ones do run code where nobody looks; of these, the plain calls.
    programs = [v for v in found if v.kind == 'program']
    torch.load(folder / f'{programs[0].name}.pth', weights_only=False)
    assert hostile.FIRED == ['call']
    hostile.FIRED.clear()


def test_loading(corpus, trained):
    """All of them, into one model: nothing changes, or all of it is as the sound file has it."""
    folder, found = corpus
    cfg, _, good = trained
    model = build_model(cfg)
    wake(model, seed=5)
    before = _state(model)
    checkpoint.load(model, good)
    expected = _state(model)
    assert not _same(before, expected)
    loaded, messages = [], set()
    for variant in found:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(before[name])
        file = folder / f'{variant.name}.pth'
        message = _refusal(model, file)
        if message is None:
            assert variant.may_load, f'{variant.name} loaded'
            assert _same(_state(model), expected), variant.name
            loaded.append(variant.name)
        else:
            assert str(file) in message, variant.name
            assert len(message) < 2000
            assert _same(_state(model), before), variant.name
            messages.add(re.sub(r'\d+', 'N', message.replace(str(file), '')))
    # Bits of padding, times and permissions mean nothing; most do.
    assert len(loaded) < sum(v.may_load for v in found) / 2
    assert len(messages) > 30


def test_resuming_and_loading_in_the_runner(corpus, trained, tmp_path):
    folder, found = corpus
    cfg = trained[0].copy()
    cfg.work_dir, cfg.experiment_name = str(tmp_path), 'hostile'
    runner = Runner.from_cfg(cfg)
    before = _state(runner.model)
    for variant in _one_of_each(found):
        for resume in (False, True):
            runner._load_from = str(folder / f'{variant.name}.pth')
            runner._resume, runner._has_loaded = resume, False
            if variant.may_load:
                continue
            with pytest.raises(CheckpointError) as caught:
                runner.load_or_resume()
            assert runner._load_from in str(caught.value), variant.name
            assert _same(_state(runner.model), before), variant.name


@pytest.mark.parametrize('key, value, match', [
    ('optimizer', None, 'no optimizer, so training cannot be resumed'),
    ('message_hub', [1], 'no message_hub'),
    ('meta', {'epoch': 1}, 'does not say how far'),
    ('meta', 3, 'does not say how far'),
    ('message_hub', {'log_scalars': {'a': {'__mmprotune_type__': 'HistoryBuffer'}}}, 'malformed'),
    ('random_state', {'python': 3}, 'random_state is malformed'),
    ('random_state', {'__mmprotune_type__': 'ndarray', 'data': 1}, 'malformed'),
])
def test_resuming_from_half_a_checkpoint(trained, tmp_path, key, value, match):
    """MMEngine would start a new optimizer and say nothing, or fail halfway."""
    cfg, _, good = trained
    content = torch.load(good, weights_only=True)
    content.pop(key) if value is None else content.update({key: value})
    file = tmp_path / 'half.pth'
    torch.save(content, file)
    cfg = cfg.copy()
    cfg.merge_from_dict(dict(work_dir=str(tmp_path), load_from=str(file), resume=True,
                             experiment_name=f'half-{tmp_path.name}', train_cfg=dict(max_epochs=2)))
    with pytest.raises(CheckpointError, match=match) as caught:
        Runner.from_cfg(cfg).train()
    assert str(file) in str(caught.value)


def _run_tool(capsys, *argv):
    capsys.readouterr()
    status = cli.run_tool(lambda: tool.main([str(a) for a in argv]))
    out, err = capsys.readouterr()
    return status, out, err


def _check_verbs(capsys, corpus, trained, out, variants, verbs):
    folder, _ = corpus
    for variant in variants:
        file = folder / f'{variant.name}.pth'
        for verb in verbs:
            argv = {'info': (file, ), 'verify': (trained[1], file)}.get(
                verb, (trained[1], file, out))
            status, _, err = _run_tool(capsys, verb, *argv)
            if verb == 'info' and status == 0:
                continue  # it describes what is there
            if variant.may_load and status == 0:
                os.unlink(out)
                continue
            assert status == 1, (variant.name, verb)
            assert str(file) in err, (variant.name, verb)
            assert 'Traceback' not in err
            assert not out.exists()
            assert not list(out.parent.glob('.*'))


def test_the_tool_describes_or_refuses_all(corpus, trained, tmp_path, capsys):
    _check_verbs(capsys, corpus, trained, tmp_path / 'o.pth', corpus[1], ['info'])


def test_the_tool_refuses_one_of_each(corpus, trained, tmp_path, capsys):
    each = [v for v in _one_of_each(corpus[1]) if not v.may_load]
    _check_verbs(capsys, corpus, trained, tmp_path / 'o.pth', each, ['merge'])


@pytest.mark.slow
def test_every_verb_refuses_all(corpus, trained, tmp_path, capsys):
    bad = [v for v in corpus[1] if not v.may_load]
    _check_verbs(capsys, corpus, trained, tmp_path / 'o.pth', bad, ['verify', 'merge', 'extract'])


@pytest.mark.slow
def test_a_thousand_more(trained, tmp_path):
    """Other seeds: truncated and flipped anywhere."""
    cfg, _, good = trained
    data = Path(good).read_bytes()
    model = build_model(cfg)
    checkpoint.load(model, good)
    expected = _state(model)
    for variant in hostile.variants(data, tmp_path / 'canary', seed=1, number=1200):
        if variant.kind not in ('truncated', 'flipped'):
            continue
        (tmp_path / 'x.pth').write_bytes(variant.content)
        assert 'x.pth' in (_refusal(model, tmp_path / 'x.pth') or 'x.pth')
        assert _same(_state(model), expected), variant.name
