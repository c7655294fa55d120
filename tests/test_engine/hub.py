"""What the Hugging Face Hub answers to its client, as far as an adapter needs it, on loopback."""
from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading


class Hub:
    """Repositories in memory: ``files[repository][name]`` are bytes."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *args):
                pass

            def answer(self):
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
                hub.requests.append(f'{self.command} {self.path}')
                status, headers, content = hub.answer(self.command, self.path, body)
                self.send_response(status)
                for name, value in {**headers, 'Content-Length': str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != 'HEAD':
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = answer

        self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.address = f'http://127.0.0.1:{self._server.server_port}'
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict, bytes]:
        path = path.partition('?')[0]
        if path == '/api/repos/create':
            sent = json.loads(body)
            name = '/'.join(filter(None, (sent.get('organization'), sent['name'])))
            self.files.setdefault(name, {})
            self.private[name] = bool(sent.get('private') or sent.get('visibility') == 'private')
            return _json(dict(url=f'{self.address}/{name}', id=name))
        if path == '/api/validate-yaml':
            return _json(dict(errors=[], warnings=[]))
        match = re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?', path)
        if match:
            name, verb, _ = match.groups()
            if name not in self.files:
                return _json(dict(error='Repository not found'), 404,
                             {'X-Error-Code': 'RepoNotFound'})
            if verb == 'preupload':
                return _json(dict(files=[
                    dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                    for f in json.loads(body)['files']]))
            if verb == 'commit':
                for line in body.decode().splitlines():
                    step = json.loads(line)
                    if step['key'] == 'file':
                        value = step['value']
                        self.files[name][value['path']] = base64.b64decode(value['content'])
                commit = self._commit(name)
                return _json(dict(commitUrl=f'{self.address}/{name}/commit/{commit}',
                                  commitOid=commit, success=True))
            if verb == 'tree':
                return _json([dict(type='file', path=file, size=len(content), oid=_oid(content))
                              for file, content in self.files[name].items()])
            return _json(dict(id=name, sha=self._commit(name), siblings=[
                dict(rfilename=file) for file in self.files[name]]))
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/[^/]+/(.+)', path)
        if match and match[2] in self.files.get(match[1], {}):
            content = self.files[match[1]][match[2]]
            headers = {'X-Repo-Commit': self._commit(match[1]), 'ETag': f'"{_oid(content)}"'}
            return 200, headers, content
        return _json(dict(error='not found'), 404)

    def _commit(self, name: str) -> str:
        return _oid(b''.join(self.files[name].values()))


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(content: object, status: int = 200, headers: dict | None = None):
    return status, {'Content-Type': 'application/json', **(headers or {})}, \
        json.dumps(content).encode()
