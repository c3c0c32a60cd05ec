import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hf_csm.errors import UserError
from hf_csm.prepare.download import RemoteArchive, download


CONTENT = bytes(range(256)) * 4_000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; cuts the first `num_cuts` answers after `cut_at` bytes; may not know Range."""

    content, num_cuts, cut_at, knows_range, status = CONTENT, 0, 300_000, True, 200

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/corpus.zip?download=1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        if server.status != 200:
            return self.send_error(server.status)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.knows_range else 0
        if start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = server.content[start:]
        self.send_response(206 if wanted and server.knows_range else 200)
        if wanted and server.knows_range:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.num_cuts:
            server.num_cuts -= 1
            body = body[: server.cut_at]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def fetch(server, folder, md5=MD5, num_bytes=None):
    return download(RemoteArchive(server.url, md5, num_bytes), folder, progress=False, wait_s=0.01)


def test_a_download_is_complete_and_happens_once(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path.name == "corpus.zip" and path.read_bytes() == CONTENT
    assert fetch(server, tmp_path) == path
    assert len(server.ranges) == 1
    assert [found.name for found in path.parent.iterdir()] == ["corpus.zip"]


def test_an_interrupted_transfer_resumes(server, tmp_path):
    server.num_cuts = 2
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    first, second = (int(wanted.removeprefix("bytes=").rstrip("-")) for wanted in server.ranges[1:])
    assert 200_000 < first <= 300_000 and 200_000 < second - first <= 300_000


def test_a_later_run_resumes_the_transfer(server, tmp_path):
    server.num_cuts, server.cut_at = 99, 100_000
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(server, tmp_path)
    (part,) = tmp_path.rglob("*.part")
    num_have = part.stat().st_size
    assert num_have > 5 * 50_000
    server.num_cuts = 0
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={num_have}-"
    assert not list(tmp_path.rglob("*.part"))


def test_a_server_without_ranges_restarts_the_transfer(server, tmp_path):
    server.num_cuts, server.knows_range = 1, False
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_partial_file_of_another_archive_is_discarded(server, tmp_path):
    server.num_cuts, server.content = 99, b"another file" * 50_000
    with pytest.raises(UserError):
        fetch(server, tmp_path)
    server.num_cuts, server.content = 0, CONTENT
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] is None


def test_a_complete_partial_file_is_used(server, tmp_path):
    path = fetch(server, tmp_path)
    path.rename(path.with_name(path.name + ".part"))
    assert fetch(server, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("facts", [{"md5": "0" * 32}, {"num_bytes": 7}])
def test_a_file_that_is_not_the_published_one_is_refused_and_removed(server, tmp_path, facts):
    with pytest.raises(UserError, match="published"):
        fetch(server, tmp_path, **facts)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_refusal_is_not_retried(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match="HTTP 404"):
        fetch(server, tmp_path)
    assert len(server.ranges) == 1
