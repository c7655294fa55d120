from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mmprotune.checkpoints.plain import from_plain, to_plain
from mmprotune.checkpoints.writing import write


def test_plain_types_round_trip(tmp_path):
    history = HistoryBuffer([1., 2.], [1, 1])
    content = dict(
        history=history, array=np.arange(3), scalar=np.float32(2), flag=np.bool_(True),
        names=('a', 'b'), steps=Counter([8, 11]), nested=[dict(x=None)], path=Path('p'))
    path = tmp_path / 'plain.pth'
    write(to_plain(content), path)
    back = from_plain(torch.load(path, weights_only=True))
    assert isinstance(back['history'], HistoryBuffer)
    assert np.array_equal(back['history'].data[0], [1., 2.])
    assert np.array_equal(back['array'], np.arange(3))
    assert (back['scalar'], back['flag'], back['names'], back['nested'], back['path']) == \
        (2.0, True, ('a', 'b'), [dict(x=None)], 'p')
    assert back['steps'] == Counter([8, 11]) and type(back['steps']) is Counter
    assert type(back['scalar']) is float and type(back['flag']) is bool


def test_what_is_not_plain_is_left_out_and_named():
    with pytest.warns(UserWarning, match=r"meta\['thing'\] is left out.*object is neither"):
        assert to_plain(dict(a=1, thing=object()), 'meta') == dict(a=1)
