"""Properties that hold for any legal prompt block and stage, and fuzz for the checkpoint reader."""
import io
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope

from mmprotune import PromptBlock, checkpoint
from mmprotune.errors import CheckpointError
from mmprotune.lean.graph import TORCH_BEFORE_2_4
from tests.conftest import build, wake
from tests.test_models import test_layouts  # noqa: F401  registers ToyTokens

# Examples are drawn from a fixed seed: a failure here is one that everybody sees.
quick = settings(max_examples=60, deadline=None, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
long = settings(quick, max_examples=3000, derandomize=False)

# --- the block ------------------------------------------------------------------------------------

DTYPES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.2}
if not TORCH_BEFORE_2_4:  # which has few operators for it on a CPU
    DTYPES[torch.float16] = 0.2
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels last': torch.channels_last}


@st.composite
def blocks(draw):
    """Legal arguments of a PromptBlock."""
    channels = draw(st.integers(1, 40))
    reduction = draw(st.one_of(st.integers(1, channels), st.floats(0.5, channels)))
    hidden = int(channels // reduction)
    norm = draw(st.sampled_from([None, dict(type='BN'), dict(type='GN', num_groups=hidden)]))
    return dict(
        channels=channels, reduction=reduction, norm_cfg=norm,
        kernel_size=draw(st.sampled_from([1, 3, 5, 7])),
        groups=draw(st.one_of(st.none(), st.sampled_from(
            [g for g in range(1, hidden + 1) if hidden % g == 0]))),
        act_cfg=draw(st.sampled_from([None, dict(type='GELU'), dict(type='ReLU')])),
        scale=draw(st.one_of(st.none(), st.floats(0.1, 2))))


@quick
@given(blocks(), st.integers(0, 3), st.integers(1, 9), st.integers(1, 9),
       st.sampled_from(list(DTYPES)), st.sampled_from(list(LAYOUTS)), st.integers(0, 2**31))
def test_any_block(options, images, height, width, dtype, layout, seed):
    """Zero at first, then finite; shape, dtype and image kept apart; every parameter trains."""
    torch.manual_seed(seed)
    block = PromptBlock(**options).to(dtype).eval()
    x = torch.randn(images, options['channels'], height, width).to(dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    with torch.no_grad():
        assert not block(x).any()
        wake(block, seed)
        whole = block(x)
        assert (whole.shape, whole.dtype) == (x.shape, x.dtype)
        assert whole.isfinite().all()
        for i in range(images):  # of one image at a time, in the ordinary layout
            alone = block(x[i:i + 1].contiguous())
            torch.testing.assert_close(whole[i:i + 1], alone, rtol=DTYPES[dtype],
                                       atol=DTYPES[dtype])
    if images:
        block(x).float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@quick
@given(st.integers(1, 6), st.integers(-2, 9), st.integers(1, 5), st.integers(1, 5))
def test_any_other_number_of_channels(channels, other, height, width):
    block = PromptBlock(channels, reduction=1)
    if other == channels or other < 0:
        return
    with pytest.raises(ValueError, match=rf'expects \(N, {channels}, H, W\), got \(1, {other}, '):
        block(torch.zeros(1, other, height, width))


@quick
@given(st.integers(-3, 20), st.one_of(st.floats(-2, 0), st.floats(0.1, 30), st.just(float('nan'))),
       st.integers(-3, 9), st.one_of(st.none(), st.integers(-2, 9)))
def test_legal_or_a_clear_error(channels, reduction, kernel_size, groups):
    """Nothing between a block that works and a ValueError that names the argument."""
    message = None
    try:
        block = PromptBlock(channels, reduction, kernel_size, groups)
    except ValueError as error:
        message = str(error)
    if message is None:
        assert block(torch.zeros(1, channels, 4, 3)).shape == (1, channels, 4, 3)
    else:
        assert any(f'prompt.{name}' in message
                   for name in ('channels', 'reduction', 'kernel_size', 'groups'))


# --- stages -----------------------------------------------------------------------------------


@settings(quick, max_examples=25)
@given(st.integers(0, 3), st.booleans(), st.integers(2, 24), st.integers(1, 2), st.integers(1, 5),
       st.integers(1, 5), st.sampled_from(['residual', 'none']))
def test_any_layout(extra, channels_last, channels, images, height, width, last_stage):
    """Maps and tokens of any number of channels, grid and extra tokens: at first the features are
    those of the frozen backbone bit by bit, then they are not; extra tokens stay."""
    extra = 0 if channels_last else extra
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build(dict(
            type='mmprotune.PromptedBackbone', freeze='all', last_stage=last_stage,
            prompt=dict(type='mmprotune.PromptBlock', reduction=2),
            backbone=dict(type='ToyTokens', extra=extra, channels_last=channels_last,
                          channels=channels))).eval()
    x = torch.randn(images, 3, 16 * height, 16 * width)
    with torch.no_grad():
        with model.without_prompts():
            expected = model(x)
        first = model(x)
        wake(model)
        then = model(x)
    for name, feature in expected.items():
        assert torch.equal(first[name], feature)
        assert then[name].shape == feature.shape
        assert not torch.equal(then[name], feature)
    if not channels_last:
        assert torch.equal(then['block0'][:, :extra], expected['block0'][:, :extra])
    assert len(model.prompts) == (4 if last_stage == 'residual' else 3)


# --- the reader -------------------------------------------------------------------------------

# Pieces of pickles, put together at random: calls, names, memo entries, states, containers.
NAMES = ['os system', 'builtins eval', 'builtins getattr', 'builtins exec', 'posix system',
         'torch FloatStorage', 'torch float32', 'torch._utils _rebuild_tensor_v2', 'torch load',
         'numpy dtype', 'numpy ndarray', 'numpy.core.multiarray _reconstruct', 'collections deque',
         'numpy.core.multiarray scalar', 'collections OrderedDict', 'collections Counter',
         'mmengine.logging.history_buffer HistoryBuffer', '_codecs encode', 'builtins set',
         'torch.serialization _get_layout', 'torch Size', 'torch UntypedStorage']
COMMAND = b'touch fuzzed'
OPCODES = [getattr(pickle, name) for name in (
    'MARK', 'STOP', 'POP', 'POP_MARK', 'DUP', 'REDUCE', 'BUILD', 'NONE', 'APPEND', 'APPENDS',
    'DICT', 'EMPTY_DICT', 'LIST', 'EMPTY_LIST', 'TUPLE', 'EMPTY_TUPLE', 'TUPLE1', 'TUPLE2',
    'TUPLE3', 'SETITEM', 'SETITEMS', 'NEWOBJ', 'NEWOBJ_EX', 'STACK_GLOBAL', 'MEMOIZE', 'NEWTRUE',
    'BINPERSID', 'OBJ', 'EMPTY_SET', 'ADDITEMS', 'FROZENSET')]
pieces = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from(NAMES).map(lambda n: b'c' + n.replace(' ', '\n').encode() + b'\n'),
    st.integers(0, 2**31 - 1).map(lambda i: b'J' + i.to_bytes(4, 'little')),
    st.integers(0, 2**31 - 1).map(lambda i: b'r' + i.to_bytes(4, 'little')),
    st.integers(0, 255).map(lambda i: b'h' + bytes([i])),
    st.sampled_from([COMMAND, b'state_dict', b'f8', b'O8', b'latin1', b'storage', b'cpu']).map(
        lambda t: b'X' + len(t).to_bytes(4, 'little') + t),
    st.binary(max_size=12))


def read(tmp_path, monkeypatch, content):
    """Reads it in an empty folder: a CheckpointError that names the file, or whatever it holds."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'fuzz.pth'
    file.write_bytes(content)
    message = str(file)
    try:
        checkpoint.inspect(file)
    except CheckpointError as error:
        message = str(error)
    assert str(file) in message
    assert os.listdir(tmp_path) == ['fuzz.pth']


def as_zip(program):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        archive.writestr('archive/data.pkl', program)
        archive.writestr('archive/version', b'3\n')
        archive.writestr('archive/data/0', bytes(64))
    return out.getvalue()


def check_programs(tmp_path, monkeypatch, parts, zipped):
    program = b'\x80\x02' + b''.join(parts) + b'.'
    read(tmp_path, monkeypatch, as_zip(program) if zipped else program)


def check_mutants(tmp_path, monkeypatch, good, edits):
    content = bytearray(good)
    for place, new, cut in edits:
        at = int(place * len(content))
        content[at:at + cut] = new
    read(tmp_path, monkeypatch, bytes(content))


programs = (st.lists(pieces, max_size=40), st.booleans())
mutants = st.lists(
    st.tuples(st.floats(0, 1), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=6)


@settings(quick, max_examples=300)
@given(*programs)
def test_fuzz_programs(tmp_path, monkeypatch, parts, zipped):
    check_programs(tmp_path, monkeypatch, parts, zipped)


@settings(quick, max_examples=150)
@given(edits=mutants)
def test_fuzz_mutants(tmp_path, monkeypatch, trained, edits):
    with open(trained[2], 'rb') as file:
        check_mutants(tmp_path, monkeypatch, file.read(), edits)


@pytest.mark.slow
@settings(long, max_examples=10_000)
@given(*programs)
def test_fuzz_many_programs(tmp_path, monkeypatch, parts, zipped):
    check_programs(tmp_path, monkeypatch, parts, zipped)


@pytest.mark.slow
@long
@given(edits=mutants)
def test_fuzz_many_mutants(tmp_path, monkeypatch, trained, edits):
    with open(trained[2], 'rb') as file:
        check_mutants(tmp_path, monkeypatch, file.read(), edits)
