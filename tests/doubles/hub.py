"""A Hugging Face Hub in this process that speaks HTTP to the real clients, for tests of pushes and downloads.

    with LocalHub("hub") as hub, hub.connected("home"):
        HfApi().create_repo("user/table", repo_type="dataset")

or, for another process, `subprocess.run(..., env=hub.environment("home"))`. It implements the endpoints that
`huggingface_hub` and `datasets` use in our tests: users and tokens, private and gated repositories, trees, commits,
branches, tags, LFS, range requests. Answers, headers and error codes are those that the clients read. No Xet, no pull
requests, no pages.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import pickle
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote

import yaml
from huggingface_hub import HfApi, snapshot_download


MAIN = "main"
LFS_SUFFIXES = [
    ".arrow",
    ".bin",
    ".flac",
    ".gz",
    ".npz",
    ".parquet",
    ".png",
    ".pt",
    ".safetensors",
    ".tar",
    ".wav",
    ".zip",
]
LFS_NUM_BYTES = 10_000_000
"""Files of this size are LFS whatever their name."""
_LICENSES = ["apache-2.0", "cc0-1.0", "gpl-3.0", "mit", "odbl", "openrail", "other", "pddl", "unknown"]
_CC_LICENSE = r"cc-by(-nc)?(-sa|-nd)?-[234]\.0"
_SIZES = re.compile(r"n<1K|1K<n<10K|10K<n<100K|100K<n<1M|1M<n<10M|10M<n<100M|n>1T")


class HubError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for the user.
        code: by which clients tell errors apart: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo.
        commit: in which an entry was not found.
    """

    def __init__(self, status: int, message: str, code: str = "", commit: str = ""):
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit


@dataclass(frozen=True)
class User:
    """The owner of a token."""

    name: str
    can_write: bool


@dataclass(frozen=True)
class File:
    """A file of a commit.

    Attributes:
        oid: SHA-1 of the git blob, which is a pointer for LFS.
        size: of the content in bytes.
        sha256: of the content, for LFS only.
    """

    oid: str
    size: int
    sha256: str | None = None

    def lfs(self, sha256_key: str) -> dict[str, Any]:
        """Return the LFS part of a listing, `{}` for other files."""
        if self.sha256 is None:
            return {}
        pointer_size = len(_pointer(self.sha256, self.size))
        return {"lfs": {sha256_key: self.sha256, "size": self.size, "pointerSize": pointer_size}}


@dataclass
class Repository:
    """A model, dataset or Space repository.

    Attributes:
        private: only its owner sees it.
        gated: only its owner may read its files.
        branches: commit id by name.
        tags: commit id by name.
        commits: files by path, by commit id.
        objects: contents by SHA-1 of the blob or, for LFS, SHA-256.
        variables: of a Space.
    """

    private: bool = False
    gated: str | bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str:
        """Return the commit id of a branch, a tag, or the first seven or more characters of an id."""
        found = self.branches.get(revision) or self.tags.get(revision)
        if found is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = next((commit_id for commit_id in self.commits if commit_id.startswith(revision)), None)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def listing(self, revision: str) -> tuple[str, list[dict[str, Any]]]:
        """Return the commit id and all files and folders, as listings of a tree have them."""
        commit_id = self.resolve(revision)
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.commits[commit_id].items()):
            for parent in [str(parent) for parent in reversed(Path(path).parents[:-1])]:
                oid = hashlib.sha1(f"{commit_id}:{parent}".encode()).hexdigest()
                found.setdefault(parent, {"type": "directory", "oid": oid, "size": 0, "path": parent})
            found[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path} | file.lfs("oid")
        return commit_id, list(found.values())

    def store(self, content: bytes) -> File:
        """Keep the content of a file that comes with its commit."""
        oid = _blob_oid(content)
        self.objects[oid] = content
        return File(oid, len(content))

    def commit(self, branch: str, operations: list[dict[str, Any]], parent: str = "") -> str:
        """Apply the operations of a commit, or none of them, and return its id.

        Args:
            branch: to move to the new commit.
            operations: `{"key": kind, "value": {...}}` each, of the kinds file, lfsFile, deletedFile, deletedFolder.
            parent: commit that the branch must be at.
        """
        if self.commits and branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self.branches.get(branch, "")
        if not head.startswith(parent):
            raise HubError(412, f"The branch is at {head}, not at {parent}.")
        files = dict(self.commits.get(head, {}))
        for operation in operations:
            kind, value, path = operation["key"], operation["value"], operation["value"]["path"]
            if path.startswith("/") or {"..", ".git", ""} & set(path.rstrip("/").split("/")):
                raise HubError(400, f"Invalid path: {path!r}")
            if kind == "file":
                files[path] = self.store(base64.b64decode(value["content"], validate=True))
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, f"LFS pointer of {path} points to an object that was not uploaded.")
                size = len(self.objects[value["oid"]])
                files[path] = File(_blob_oid(_pointer(value["oid"], size)), size, value["oid"])
            else:
                is_folder = kind == "deletedFolder"
                gone = [p for p in files if p == path or (is_folder and p.startswith(path.rstrip("/") + "/"))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound", head)
                for deleted in gone:
                    del files[deleted]
        commit_id = secrets.token_hex(20)
        self.commits[commit_id] = files
        self.branches[branch] = commit_id
        return commit_id


class LocalHub:
    """The server and its repositories; a context manager.

    Args:
        folder: where the repositories are kept when the context ends, and found by the next hub of this folder.

    Attributes:
        endpoint: its address, for `HF_ENDPOINT`.
        token: of the user `user`, who may write.
        users: by token.
        requests: every request so far, as `PUT /path`.
        repositories: by kind and name, such as `datasets/user/table`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.requests: list[str] = []
        state = self.folder / "repositories.pkl"
        self.repositories: dict[str, Repository] = pickle.loads(state.read_bytes()) if state.exists() else {}
        self.users: dict[str, User] = {}
        self.token = self.add_user("user")
        self.lock = threading.RLock()
        self.signature = secrets.token_hex(8)
        self._failing: tuple[str | None, int | None] | None = None
        self._num_to_serve = 0
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "repositories.pkl").write_bytes(pickle.dumps(self.repositories))

    def add_user(self, name: str, *, can_write: bool = True) -> str:
        """Return a new token of a user. Without `can_write`, it only reads."""
        token = f"hf_{secrets.token_hex(17)}"
        self.users[token] = User(name, can_write)
        return token

    def fail_after(self, num_requests: int, method: str | None = None, status: int | None = None) -> None:
        """Serve `num_requests` more requests and fail all that follow, until `recover`.

        Args:
            num_requests: to serve before.
            method: of the requests that count and fail; all by default.
            status: to answer; by default the connection is dropped after half of the request's body.
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
        """Return the environment of a process that uses this Hub.

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
            reset_sessions()  # sessions keep the offline mode they were made in
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for module, name, value in before:
                setattr(module, name, value)
            reset_sessions()


def card_problems(card: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Return the errors and warnings about a card's metadata: the fields with closed lists are checked."""
    try:
        metadata = _front_matter(card)
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {str(error).splitlines()[0]}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    checks: dict[str, Callable[[Any], Any]] = {
        "license": lambda value: value in _LICENSES or re.fullmatch(_CC_LICENSE, str(value)),
        "language": lambda value: re.fullmatch("[a-z]{2,3}", str(value)),
        "tags": lambda value: isinstance(value, str),
        "pretty_name": lambda value: isinstance(value, str),
    }
    if repo_type == "dataset":
        checks["size_categories"] = lambda value: _SIZES.fullmatch(str(value))
        checks["configs"] = lambda value: "config_name" in value
    errors = []
    for name, is_valid in checks.items():
        values = metadata.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not is_valid(value):
                errors.append(f'"{name}" must not be {value!r}')
    return errors, []


def _front_matter(card: str) -> Any:
    match = re.match(r"---\n(.*?)^---\s*$", card, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(match[1]) if match else None


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


_KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_GIT = r"/(?P<kind>datasets/|spaces/|)(?P<repo_id>[^/]+/[^/]+)"
_ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., None]]] = []


def _route(methods: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a method of the handler answer an address; the groups of the pattern are its arguments."""

    def add(action: Callable[..., None]) -> Callable[..., None]:
        _ROUTES.append((methods.split(), re.compile(pattern), action))
        return action

    return add


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection. A subclass has `hub`."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: with two, the client's delayed ACK costs 40 ms
    hub: LocalHub

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        self.hub.requests.append(f"{self.command} {path}")
        self.query = dict(parse_qsl(query))
        num_bytes = int(self.headers.get("Content-Length") or 0)
        fails, status = self.hub.failure(self.command)
        is_dropped = fails and status is None
        self.body = self.rfile.read(num_bytes // 2 if is_dropped else num_bytes)
        if is_dropped or len(self.body) < num_bytes:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            if status is not None and fails:
                raise HubError(status, "This failure was asked for.")
            self.answer(path)
        except HubError as error:
            found = {"X-Error-Code": error.code, "X-Error-Message": error.message, "X-Repo-Commit": error.commit}
            headers = {name: value for name, value in found.items() if value}
            self.send(error.status, {"error": error.message}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def answer(self, path: str) -> None:
        for methods, pattern, action in _ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command in methods:
                return action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise self.not_found() if path.startswith("/api/") else HubError(404, "No such page.")

    def asked(self) -> Any:
        return json.loads(self.body or b"{}")

    def send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a content, or the range of it that is asked for."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.send(200, content, headers)
        size, last = len(content), int(asked[2] or len(content))
        first, end = (int(asked[1]), min(size, last + 1)) if asked[1] else (max(0, size - last), size)
        if first >= end:
            return self.send(416, {}, {"Content-Range": f"bytes */{size}"})
        self.send(206, content[first:end], headers | {"Content-Range": f"bytes {first}-{end - 1}/{size}"})

    def user(self) -> User | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def not_found(self) -> HubError:
        # The Hub answers 401 to all who are not logged in; by the address alone, clients take that as "not found".
        return HubError(404 if self.user() else 401, "Repository not found", "RepoNotFound")

    def repository(self, kind: str, repo_id: str, *, write: bool = False) -> Repository:
        user, found = self.user(), self.hub.repositories.get(f"{kind.rstrip('/') or 'models'}/{repo_id}")
        owner = repo_id.partition("/")[0]
        if found is None or (found.private and (user is None or user.name != owner)):
            raise self.not_found()
        if write:
            self.check_writes(owner)
        return found

    def check_writes(self, owner: str) -> None:
        """Refuse users who may not write to the repositories of `owner`."""
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user.name != owner or not user.can_write:
            raise HubError(403, f"You don't have the rights to write under the namespace {owner!r}")

    @_route("GET", r"/api/whoami-v2")
    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if user.can_write else "read"}
        auth = {"type": "access_token", "accessToken": token}
        self.send(200, {"type": "user", "name": user.name, "fullname": user.name, "orgs": [], "auth": auth})

    @_route("POST DELETE", r"/api/repos/(create|delete)")
    def create_or_delete(self) -> None:
        asked, user = self.asked(), self.user()
        owner, kind, name = asked.get("organization"), f"{asked.get('type') or 'model'}s", asked["name"]
        owner = owner or (user.name if user else "")
        self.check_writes(owner)
        if not re.fullmatch(r"[\w][\w.-]{0,95}", name):
            raise HubError(400, f"Invalid repository name: {name!r}")
        key, url = f"{kind}/{owner}/{name}", f"{self.hub.endpoint}/{_KINDS[kind]}{owner}/{name}"
        with self.hub.lock:
            if self.command == "DELETE":
                if self.hub.repositories.pop(key, None) is None:
                    raise self.not_found()
            elif key in self.hub.repositories:
                return self.send(409, {"error": "You already created this repository", "url": url})
            else:
                made = self.hub.repositories[key] = Repository(bool(asked.get("private")))
                rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
                first = {"path": ".gitattributes", "content": base64.b64encode(rules.encode()).decode()}
                made.commit(MAIN, [{"key": "file", "value": first}])
        self.send(200, {"url": url, "name": f"{owner}/{name}"})

    @_route("POST", r"/api/validate-yaml")
    def validate_yaml(self) -> None:
        asked = self.asked()
        errors, warnings = card_problems(asked["content"], asked["repoType"])
        answer = {key: [{"message": m} for m in found] for key, found in (("errors", errors), ("warnings", warnings))}
        self.send(400 if errors else 200, answer)

    @_route("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id)
        commit_id = repository.resolve(revision or MAIN)
        files = repository.commits[commit_id]
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in files]
        if self.query.get("blobs"):
            for entry, file in zip(siblings, files.values(), strict=True):
                entry |= {"size": file.size, "blobId": file.oid} | file.lfs("sha256")
        card: dict[str, Any] = {}
        if "README.md" in files:
            card = _front_matter(repository.objects[files["README.md"].oid].decode()) or {}
        answer = {"id": repo_id, "author": repo_id.partition("/")[0], "sha": commit_id, "siblings": siblings}
        answer |= {"private": repository.private, "gated": repository.gated, "disabled": False, "downloads": 0}
        self.send(200, answer | {"tags": card.get("tags", []), "cardData": card, "likes": 0})

    @_route("PUT", _API + r"/settings")
    def settings(self, kind: str, repo_id: str) -> None:
        repository, asked = self.repository(kind, repo_id, write=True), self.asked()
        repository.private = asked.get("private", repository.private)
        repository.gated = asked.get("gated", repository.gated)
        self.send(200, {})

    @_route("GET POST DELETE", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables")
    def variables(self, repo_id: str) -> None:
        variables, asked = self.repository("spaces", repo_id, write=True).variables, self.asked()
        if self.command == "POST":
            variables[asked["key"]] = asked["value"]
        elif self.command == "DELETE":
            variables.pop(asked["key"], None)
        self.send(200, {key: {"value": value} for key, value in variables.items()})

    @_route("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        commit_id, entries = self.repository(kind, repo_id).listing(revision)
        inside = f"{path}/" if path else ""
        is_recursive = self.query.get("recursive", "").lower() == "true"
        entries = [entry for entry in entries if entry["path"].startswith(inside)]
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", commit_id)
        self.send(200, [entry for entry in entries if is_recursive or "/" not in entry["path"][len(inside) :]])

    @_route("POST", _API + r"/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        paths = {path.rstrip("/") for path in parse_qs(self.body.decode()).get("paths", [])}
        _, entries = self.repository(kind, repo_id).listing(revision)
        self.send(200, [entry for entry in entries if entry["path"] in paths])

    @_route("GET", _API + r"/refs")
    def refs(self, kind: str, repo_id: str) -> None:
        repository = self.repository(kind, repo_id)
        branches, tags = (
            [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit} for name, commit in found.items()]
            for folder, found in (("heads", repository.branches), ("tags", repository.tags))
        )
        self.send(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @_route("POST", _API + r"/(?P<ref>branch|tag)/(?P<name>[^/]+)")
    def add_ref(self, kind: str, repo_id: str, ref: str, name: str) -> None:
        repository, asked = self.repository(kind, repo_id, write=True), self.asked()
        refs = repository.branches if ref == "branch" else repository.tags
        # The address has the new branch, or the revision that gets the tag.
        name, revision = (name, asked.get("startingPoint", MAIN)) if ref == "branch" else (asked["tag"], name)
        with self.hub.lock:
            if name in refs:
                raise HubError(409, f"Reference already exists: {name}")
            refs[name] = repository.resolve(revision)
        self.send(200, {})

    @_route("POST", _API + r"/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        present = repository.commits[repository.resolve(revision)]
        answer = []
        for file in self.asked()["files"]:
            path, found = file["path"], present.get(file["path"])
            is_lfs = file["size"] >= LFS_NUM_BYTES or Path(path).suffix in LFS_SUFFIXES
            entry = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            answer.append(entry | ({"oid": found.sha256 or found.oid} if found else {}))
        self.send(200, {"files": answer})

    @_route("POST", _GIT + r"\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind: str, repo_id: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        verify = {"href": f"{self.hub.endpoint}/{kind}{repo_id}.git/info/lfs/verify"}
        objects = []
        for entry in self.asked()["objects"]:
            actions = {"upload": {"href": self.object_url(kind, repo_id, entry["oid"])}, "verify": verify}
            objects.append(entry | ({} if entry["oid"] in repository.objects else {"actions": actions}))
        self.send(200, {"transfer": "basic", "objects": objects})

    @_route("POST", _GIT + r"\.git/info/lfs/verify")
    def lfs_verify(self, kind: str, repo_id: str) -> None:
        asked, objects = self.asked(), self.repository(kind, repo_id, write=True).objects
        if len(objects.get(asked["oid"], b"")) != asked["size"]:
            raise HubError(404, f"Object {asked['oid']} was not received.")
        self.send(200, {})

    def object_url(self, kind: str, repo_id: str, sha256: str) -> str:
        """Return the address of the content of an LFS file, which is signed and needs no token, as on the Hub."""
        return (
            f"{self.hub.endpoint}/lfs/{kind.rstrip('/') or 'models'}/{repo_id}/{sha256}?signature={self.hub.signature}"
        )

    @_route("PUT GET HEAD", r"/lfs/(?P<kind>[^/]+)/(?P<repo_id>[^/]+/[^/]+)/(?P<sha256>[^/]+)")
    def object(self, kind: str, repo_id: str, sha256: str) -> None:
        repository = self.hub.repositories.get(f"{kind}/{repo_id}")
        if self.query.get("signature") != self.hub.signature or repository is None:
            raise HubError(403, "Access denied")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != sha256:
                raise HubError(400, "The content does not have the SHA-256 it was announced with.")
            repository.objects[sha256] = self.body
            self.send(200, {})
        elif sha256 in repository.objects:
            self.send_content(repository.objects[sha256], {"ETag": f'"{sha256}"'})
        else:
            raise HubError(404, "No such object")

    @_route("POST", _API + r"/commit/(?P<revision>[^/]+)")
    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line]
        with self.hub.lock:
            commit_id = repository.commit(revision, operations, header["value"].get("parentCommit") or "")
        url = f"{self.hub.endpoint}/{_KINDS[kind]}{repo_id}/commit/{commit_id}"
        self.send(200, {"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""})

    @_route("GET HEAD", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def file(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repository, user = self.repository(kind, repo_id), self.user()
        if repository.gated and (user is None or user.name != repo_id.partition("/")[0]):
            raise HubError(403 if user else 401, f"Access to {repo_id} is restricted.", "GatedRepo")
        commit_id = repository.resolve(revision)
        found = repository.commits[commit_id].get(path)
        if found is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit_id)
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{found.oid}"'}
        if found.sha256 is None:
            return self.send_content(repository.objects[found.oid], headers)
        headers |= {"Location": self.object_url(kind, repo_id, found.sha256)}
        headers |= {"X-Linked-Etag": f'"{found.sha256}"', "X-Linked-Size": str(found.size)}
        self.send(302, {}, headers)


# The content of repositories, through the real client


def remote_files(repo_id, revision=None):
    return set(HfApi().list_repo_files(repo_id, revision=revision)) - {".gitattributes"}


def remote_oids(repo_id):
    """Return the hash of each file of a model repository."""
    tree = HfApi().list_repo_tree(repo_id, recursive=True)
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree}


def snapshot(repo_id, revision=None):
    return Path(snapshot_download(repo_id, revision=revision))


def remote_json(repo_id, name, revision=None):
    return json.loads((snapshot(repo_id, revision) / name).read_text())


def puts(hub):
    """Return the uploads of large files."""
    return [request for request in hub.requests if request.startswith("PUT /lfs/")]
