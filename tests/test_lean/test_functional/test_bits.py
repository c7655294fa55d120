import os
import subprocess
import sys

import pytest
import torch

from mmprotune.lean.functional.bits import (
    pack_bits,
    pack_bits_anywhere,
    select_bits,
    select_bits_anywhere,
)

COUNTS = (1, 7, 8, 9, 64, 1003, 4099)


def masked(count, dtype=torch.float32):
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    grad = torch.arange(1., count + 1).to(dtype)
    grad[x <= 0] = float('nan')  # which nothing may carry on
    return x, grad


@pytest.mark.parametrize('count', COUNTS)
def test_masks_are_packed_alike_on_every_device(count):
    x, grad = masked(count)
    bits = pack_bits(x > 0)
    assert bits.dtype == torch.uint8 and len(bits) == (count + 7) // 8
    assert torch.equal(bits, pack_bits_anywhere(x > 0)) and torch.equal(bits, pack_bits(x.relu()))
    expected = torch.where(x > 0, grad, 0)
    assert torch.equal(select_bits(grad, bits), expected)
    assert torch.equal(select_bits_anywhere(grad, bits), expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_precision(dtype):
    x, grad = masked(1003, dtype)
    for select in (select_bits, select_bits_anywhere):
        found = select(grad, pack_bits(x > 0))
        assert found.dtype == dtype and torch.equal(found, torch.where(x > 0, grad, 0))


def test_any_order_in_memory():
    x, grad = (t[:960].view(2, 4, 12, 10).to(memory_format=torch.channels_last)
               for t in masked(1003))
    found = select_bits(grad, pack_bits(x > 0))
    assert found.stride() == x.stride() and torch.equal(found, torch.where(x > 0, grad, 0))


INTERPRETED = f"""
import torch
from mmprotune.lean.functional import bits_triton
from mmprotune.lean.functional.bits import pack_bits
from tests.test_lean.test_functional.test_bits import masked
for count in {COUNTS}:
    for dtype in (torch.float32, torch.float64, torch.float16):
        x, grad = masked(count, dtype)
        bits = bits_triton.pack(x > 0)
        assert torch.equal(bits, pack_bits(x > 0)), (count, dtype)
        assert torch.equal(bits, bits_triton.pack(x.relu())), (count, dtype)
        assert torch.equal(bits_triton.select(grad, bits), torch.where(x > 0, grad, 0)), count
print('alike')
"""


def test_the_kernels_by_tritons_interpreter():
    pytest.importorskip('triton', '3.0')
    done = subprocess.run([sys.executable, '-c', INTERPRETED], capture_output=True, text=True,
                          env=dict(os.environ, TRITON_INTERPRET='1'), check=False)
    assert done.stdout == 'alike\n', done.stderr
