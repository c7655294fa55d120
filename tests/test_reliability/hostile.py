"""A seeded corpus of broken and hostile variants of one slim checkpoint."""
from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

FINGERPRINT = 'backbone.frozen_fingerprint'
FIRED: list[str] = []


def fire(where: str) -> dict:
    """What a hostile pickle would like to call."""
    FIRED.append(where)
    return {}


@dataclass
class Variant:
    """One broken file.

    Attributes:
        name (str): Its kind and number.
        content (bytes): The file.
        may_load (bool): Whether it may load, if what it loads is the original bit by bit.
    """
    name: str
    content: bytes
    may_load: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition('-')[0]


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Callable, *args) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class State:
    """Pickles as an object whose state is set to something that fires."""

    def __reduce__(self):
        return collections.OrderedDict, (), Call(fire, 'state')


def _saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _repacked(data: bytes, replace: dict[str, bytes], compression: int = zipfile.ZIP_STORED,
              add: dict[str, bytes] | None = None) -> bytes:
    """The zip archive with some entries' content replaced, correct checksums and all."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w', compression) as new:
        for entry in old.infolist():
            inner = entry.filename.partition('/')[2]
            new.writestr(entry.filename, replace.get(inner, old.read(entry)))
        for name, content in (add or {}).items():
            new.writestr(f'archive/{name}', content)
    return out.getvalue()


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


def _truncated(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """At any byte: the ends of a file are looked at more often than the middle."""
    for i in range(40):
        yield data[:[rng.randrange(len(data)), rng.randrange(200), len(data) - 1 -
                     rng.randrange(4000)][i % 3]]


def _flipped(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """One bit, or a burst of noise: anywhere, in the pickle, in the directory at the end."""
    pickle_at = data.index(b'data.pkl')
    for i in range(60):
        at = [rng.randrange(len(data)), pickle_at + rng.randrange(2000),
              len(data) - 1 - rng.randrange(6000), rng.randrange(len(data))][i % 4]
        broken = bytearray(data)
        for offset in range(1 if i % 4 < 3 else 64):
            if at + offset < len(data):
                broken[at + offset] ^= 1 << rng.randrange(8)
        yield bytes(broken)


def _content(data: bytes, change: Callable[[dict], None]) -> bytes:
    content = torch.load(io.BytesIO(data), weights_only=True)
    change(content)
    return _saved(content)


def _keys(data: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Shapes, missing and extra keys, values, fingerprints, classes."""
    state = torch.load(io.BytesIO(data), weights_only=True)['state_dict']
    weights = sorted(k for k, v in state.items() if v.is_floating_point() and v.dim() > 1)
    prompts = [k for k in weights if '.prompts.' in k]
    heads = [k for k in weights if not k.startswith('backbone.')]

    def changed(change: Callable[[dict], None]) -> bytes:
        return _content(data, lambda content: change(content['state_dict']))

    def some(i: int) -> str:
        return rng.choice(prompts if i % 2 else heads)

    reshape = [lambda v: v[:-1], lambda v: v.flatten(), lambda v: v.unsqueeze(0),
               lambda v: torch.cat([v, v]), lambda v: v[:0], lambda v: v.transpose(0, 1)[:-1]]
    for i in range(12):
        key = some(i)
        yield 'shape', changed(lambda s, k=key, i=i: s.update({k: reshape[i % 6](s[k]).clone()}))
    for i in range(12):
        key = [some(i), f'{FINGERPRINT}'][i % 6 == 5]
        yield 'missing', changed(lambda s, k=key: s.pop(k))
    yield 'missing', changed(lambda s: [s.pop(k) for k in list(s) if k.startswith('neck.')])
    yield 'missing', changed(lambda s: [s.pop(k) for k in list(s) if k.startswith('backbone.')])
    for i in range(8):
        key = ['backbone.prompts.stage9.x', 'head.x', f'{some(i)}_', 'backbone.conv1.weight',
               'backbone.backbone.conv1.weight', '', 'backbone.', 'backbone.prompts.'][i]
        yield 'extra', changed(lambda s, k=key: s.update({k: torch.zeros(1)}))
    for i in range(10):
        value = [float('nan'), float('inf'), -float('inf')][i % 3]
        key = some(i)
        yield 'nan', changed(lambda s, k=key, v=value: s[k].view(-1)[:1].fill_(v))
    for i in range(6):
        other = torch.tensor([rng.randrange(256) for _ in range(32)], dtype=torch.uint8)
        if i > 1:
            other = [other[:-1], other.float() * 1e9, other.view(4, 8), other * 0][i - 2]
        yield 'fingerprint', changed(lambda s, v=other: s.update({FINGERPRINT: v}))
    for classes in (2, 4, 81):
        yield 'classes', changed(lambda s, n=classes: s.update({
            'roi_head.bbox_head.fc_cls.weight': torch.zeros(n, 16),
            'roi_head.bbox_head.fc_cls.bias': torch.zeros(n)}))
    kinds = [lambda v: v.to(torch.int32), lambda v: v.to(torch.complex64), lambda v: v.bool(),
             lambda v: v.to_sparse(), lambda v: v.to('meta'), lambda v: v.tolist(),
             lambda v: None, lambda v: {'a': v}]
    for i, kind in enumerate(kinds):
        key = some(i)
        yield 'type', changed(lambda s, k=key, f=kind: s.update({k: f(s[k])}))
    for content in ([1, 2], {}, {'state_dict': {}}, {'state_dict': [1]}, 'text', None,
                    {'state_dict': {1: torch.zeros(1)}}):
        yield 'content', _saved(content)


def _bombs(data: bytes) -> Iterator[bytes]:
    """Small files that would become large."""
    zeros = bytes(1 << 25)
    yield _repacked(data, {'data/0': zeros}, zipfile.ZIP_DEFLATED)
    yield _repacked(data, {}, zipfile.ZIP_BZIP2, add={'data/9999': zeros})
    # One entry that the directory lists 50,000 times.
    end = data.rindex(b'PK\x05\x06')
    start, = struct.unpack('<I', data[end + 16:end + 20])
    first = data[start:start + 46 + sum(struct.unpack('<HHH', data[start + 28:start + 34]))]
    # Stored, but with a size of the unpacked content that is not there.
    lied = bytearray(data)
    lied[start + 24:start + 28] = struct.pack('<I', 0xfffffff0)
    yield bytes(lied)
    many = first * 50_000
    yield data[:start] + many + b'PK\x05\x06' + struct.pack(
        '<HHHHIIH', 0, 0, 50_000, 50_000, len(many), start, 0)
    huge = (b'\x80\x02' + _global('mmengine.logging.history_buffer.HistoryBuffer') + b'0')
    # A memo entry with a number for which pickle in C takes 16 GiB.
    yield _repacked(data, {'data.pkl': huge + b'}r' + struct.pack('<I', 0x7fffffff) + b'.'})
    # An array of 8 TiB.
    yield _repacked(data, {'data.pkl': huge + _global('numpy.core.multiarray._reconstruct') +
                           _global('numpy.ndarray') + b'\x8a\x06' + struct.pack('<Q', 1 << 40)[:6] +
                           b'\x85C\x01b\x87R.'})
    # A tensor of 4 TiB over a storage of none.
    yield _content(data, lambda c: c['state_dict'].update(
        {'neck.x': torch.zeros(1).expand(1 << 40)}))
    deep = b'\x80\x02}X\x0a\x00\x00\x00state_dict' + b']' * 100_000 + b'a' * 99_999 + b's.'
    yield _repacked(data, {'data.pkl': deep})


def _programs(data: bytes, canary: Path) -> Iterator[bytes]:
    """Files that would run code: as a zip, as a bare pickle, in the weights, in the metadata."""
    source = f'open({str(canary)!r}, "w")'
    touch = f'touch {canary}'
    calls = [Call(fire, 'call'), Call(os.system, touch), Call(eval, source), Call(exec, source),
             Call(os.popen, touch), Call(__import__, 'tests.test_reliability.fired'),
             Call(getattr, Path, 'touch'), State(), Call(torch.hub.load, 'a/b', 'c'),
             Call(torch.load, str(canary))]
    for call in calls:
        for place in ('state_dict', 'meta', 'optimizer'):
            content = torch.load(io.BytesIO(data), weights_only=True)
            if isinstance(call, State) and place == 'optimizer':
                content[place] = call
            else:
                content[place]['x'] = call
            yield _saved(content)
        yield pickle.dumps({'state_dict': call})
    # By the protocols' other ways: INST, OBJ, STACK_GLOBAL with a dotted name, the extension codes.
    for code in (b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
                 b'(cos\nsystem\nX' + struct.pack('<I', len(touch)) + touch.encode() + b'o.',
                 b'\x80\x04\x8c\x05torch\x8c\x0fstorage.os.exit)\x93)R.', b'\x80\x02\x82\x01.'):
        yield _repacked(data, {'data.pkl': code})
    yield _repacked(data, {}, add={'constants.pkl': b'\x80\x02).', 'code/__torch__.py': b'x = 1'})
    old = io.BytesIO()
    with tarfile.open(fileobj=old, mode='w') as archive:
        link = tarfile.TarInfo('storages')
        link.type, link.linkname = tarfile.SYMTYPE, str(canary)
        archive.addfile(link)
    yield old.getvalue()


def variants(data: bytes, canary: Path, seed: int = 0, number: int = 200) -> list[Variant]:
    """Makes the corpus.

    Args:
        data (bytes): A slim checkpoint with optimizer state.
        canary (Path): File that the hostile ones try to make.
        seed (int): Of the choice of places. Defaults to 0.
        number (int): How many. All kinds are there from 200 on; more mean more of the truncated
            and flipped ones. Defaults to 200.

    Returns:
        list[Variant]: The corpus, the same for the same arguments.
    """
    rng = random.Random(seed)
    found = [Variant(f'truncated-{i}', c) for i, c in enumerate(_truncated(data, rng))]
    found += [Variant(f'{kind}-{i}', c) for i, (kind, c) in enumerate(_keys(data, rng))]
    found += [Variant(f'bomb-{i}', c) for i, c in enumerate(_bombs(data))]
    found += [Variant(f'program-{i}', c) for i, c in enumerate(_programs(data, canary))]
    found += [Variant(f'other-{i}', c) for i, c in enumerate([
        b'', b'\n', b'<!DOCTYPE html><html>404</html>', b'PK\x03\x04', b'PK\x05\x06' + bytes(18),
        bytes(1000), rng.randbytes(5000), b'version https://git-lfs.github.com/spec/v1\n'])]
    flips = 0
    while len(found) < number:
        for content in _flipped(data, rng):
            found.append(Variant(f'flipped-{flips}', content, may_load=True))
            flips += 1
    return found[:number]
