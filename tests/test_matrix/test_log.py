"""The file of results."""
import pytest

from mmprotune.matrix.limits import Limits
from mmprotune.matrix.log import Log, settings


def test_a_file_that_is_no_log_stays_as_it_is(tmp_path):
    path = tmp_path / 'thesis.txt'
    for text in ('One.\nTwo.\n', 'One line', '{"key": "x"}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match='thesis.txt'):
            Log(path, settings(Limits()))
        assert path.read_text() == text
