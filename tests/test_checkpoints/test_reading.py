"""Files at addresses are read as those at paths are: nothing in them runs."""
import functools
import http.server
import os
import pickle
import threading

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmprotune.errors import UnreadableCheckpoint


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and its address on this machine."""
    folder = tmp_path / 'served'
    folder.mkdir()
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))

    class Handler(http.server.SimpleHTTPRequestHandler):

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
    thread.join()


class Malice:

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark), )


def test_nothing_in_a_downloaded_file_is_run(served, tmp_path):
    folder, address = served
    for name, save in (('zip', torch.save), ('pickle', lambda x, path: path.write_bytes(
            pickle.dumps(x)))):
        save(dict(state_dict=Malice(tmp_path / 'mark')), folder / f'{name}.pth')
        with pytest.raises(UnreadableCheckpoint):
            CheckpointLoader.load_checkpoint(f'{address}/{name}.pth', map_location='cpu')
    assert not (tmp_path / 'mark').exists()


def test_a_downloaded_file_is_kept(served, tmp_path):
    folder, address = served
    torch.save(dict(state_dict=dict(a=torch.ones(2)), message_hub=HistoryBuffer([1.], [1])),
               folder / 'a.pth')
    for _ in range(2):  # the second time without the server's file
        found = CheckpointLoader.load_checkpoint(f'{address}/a.pth?download=1')
        assert torch.equal(found['state_dict']['a'], torch.ones(2))
        (folder / 'a.pth').unlink(missing_ok=True)
    assert (tmp_path / 'hub' / 'checkpoints' / 'a.pth').is_file()
    with pytest.raises(OSError, match='404'):
        CheckpointLoader.load_checkpoint(f'{address}/none.pth')
