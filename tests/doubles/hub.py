"""A Hugging Face Hub on this machine, for tests of what is pushed and pulled: it speaks HTTP to the real clients.

    with LocalHub("hub") as hub, hub.connected("home"):
        HfApi().create_repo("user/table", repo_type="dataset")

or, for another process, `subprocess.run(..., env=hub.environment("home"))`. It knows what `huggingface_hub` and
`datasets` ask for: users and tokens, private and gated repositories, trees, commits, branches, tags, LFS, downloads in
ranges. It answers in the Hub's words, and fails where it is told to. It does not offer Xet, pull requests or pages.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.doubles.hub_handler import HubHandler
from tests.doubles.hub_repository import Repository


@dataclass(frozen=True)
class User:
    """Who a token belongs to."""

    name: str
    can_write: bool


class LocalHub:
    """The server and what it stores; a context manager. Every file of a repository is under `folder`.

    Args:
        folder: is made; a hub of before goes on with its repositories.

    Attributes:
        endpoint: its address, for `HF_ENDPOINT`.
        token: of the user `user`, who may write.
        requests: every request so far, as `PUT /path`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.requests: list[str] = []
        self.repositories = {
            str(found.parent.relative_to(self.folder)): Repository.open(found.parent)
            for found in self.folder.glob("*/*/*/repository.json")
        }
        self.users: dict[str, User] = {}
        self.token = self.add_user("user")
        self.lock = threading.RLock()
        self.signature = secrets.token_hex(8)
        self._failing: tuple[str | None, int | None] | None = None
        self._num_to_serve = 0
        self._server = _Server(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_user(self, name: str, *, can_write: bool = True) -> str:
        """Return a new token of a user, for all that is the user's or, without `can_write`, to read it only."""
        token = f"hf_{secrets.token_hex(17)}"
        self.users[token] = User(name, can_write)
        return token

    def fail_after(self, num_requests: int, method: str | None = None, status: int | None = None) -> None:
        """Serve so many more requests and fail all that follow, until `recover`.

        Args:
            num_requests: that are served yet.
            method: of the requests that count and fail; all by default.
            status: to answer; by default the connection is dropped when half of the request's body has come.
        """
        with self.lock:
            self._failing, self._num_to_serve = (method, status), num_requests

    def recover(self) -> None:
        """Serve all requests again."""
        self._failing = None

    def failure(self, method: str) -> tuple[bool, int | None]:
        """Count a request; return whether it is to fail, and the status to answer."""
        with self.lock:
            if self._failing is None or self._failing[0] not in (None, method):
                return False, None
            self._num_to_serve -= 1
            return self._num_to_serve < 0, self._failing[1]

    def environment(self, home: str | Path, token: str | None = "") -> dict[str, str]:
        """Return the environment of a process whose Hub this is.

        Args:
            home: of its caches, for `HF_HOME`.
            token: `None` for a user who is not logged in; that of `user` by default.
        """
        own = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
        environment |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        # `datasets` counts downloads at another host, clients report their use.
        environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        token = self.token if token == "" else token
        return environment | ({} if token is None else {"HF_TOKEN": token})

    @contextlib.contextmanager
    def connected(self, home: str | Path, token: str | None = "") -> Iterator[None]:
        """Make this the Hub of `huggingface_hub` in this process, which read its environment at import.

        Arguments as for `environment`. `datasets` keeps more copies of the address: give it a process of its own.
        """
        from huggingface_hub import constants, file_download
        from huggingface_hub.utils import reset_sessions

        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        values: list[tuple[Any, str, Any]] = [
            (constants, "ENDPOINT", self.endpoint),
            (constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            (file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_DISABLE_XET", True),
            (constants, "HF_HUB_CACHE", str(Path(home, "hub"))),
            (constants, "HF_TOKEN_PATH", str(Path(home, "token"))),
        ]
        before = [(module, name, getattr(module, name)) for module, name, _ in values]
        environment = dict(os.environ)
        try:
            own = self.environment(home, token)
            os.environ.clear()
            os.environ.update(own)
            for module, name, value in values:
                setattr(module, name, value)
            reset_sessions()  # they remember whether they are offline
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for module, name, value in before:
                setattr(module, name, value)
            reset_sessions()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)
