"""The table of docs/blocks.md, computed again: ``pytest -s`` prints its figures."""
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from mmprotune.lean.memory import KeptBytes
from mmprotune.models import prompts
from tests.conftest import build

PAGE = Path(__file__).resolve().parents[3] / 'docs/blocks.md'
BLOCKS = sorted(set(prompts.__all__) - {'BasePrompt'})


@functools.cache
def kept(name: str, lean: bool) -> float:
    """Bytes kept for one block, for each element of a float32 feature of 256 channels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 256, 16, 16), nn.Conv2d(256, 256, 1), nn.Conv2d(256, 8, 1))
    # The second of two: behind the first one, features require a gradient.
    model = build(dict(type='mmprotune.PromptedBackbone', backbone=net, stages=['0', '1'],
                       prompt=dict(type=f'mmprotune.{name}'),
                       lean=dict(prompts='output' if lean else False))).train()
    with KeptBytes(model) as count:
        output = model(torch.randn(2, 3, 256, 256))
    second = f'prompts.{model.stages[1].name}'
    found = sum(n for path, n in count.by_module().items() if f'{path}.'.startswith(f'{second}.'))
    del output
    return found / (2 * 256 * 16**2)


@pytest.mark.parametrize('name', BLOCKS)
def test_row(name):
    rows = {row.split('|')[1].strip(): [cell.strip() for cell in row.split('|')[1:-1]]
            for row in PAGE.read_text(encoding='utf-8').splitlines()
            if re.match(r'\| `\w*Prompt', row)}
    assert set(rows) == {f'`{block}`' for block in BLOCKS}
    parameters = sum(p.numel() for p in getattr(prompts, name)(256).parameters())
    lean, ordinary = kept(name, lean=True), kept(name, lean=False)
    figures = [f'{parameters:,}', f'{lean:.1f}', f'{lean / kept("PromptBlock", lean=True):.2f}',
               f'{ordinary:.1f}']
    print(name, *figures)
    assert rows[f'`{name}`'][3:] == figures
