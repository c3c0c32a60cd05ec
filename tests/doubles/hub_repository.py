"""A repository of the stand-in Hub: commits, branches, tags and large objects, kept in one folder.

Files are known by what the real Hub knows them by: the SHA-1 of their git blob, and the SHA-256 of their content where
that is kept outside git (LFS).
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import json
import os
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


MAIN = "main"
_BINARY = (
    "7z arrow bin bz2 ckpt flac gz h5 jpg model mp3 npy npz onnx parquet pkl png pt pth safetensors tar tgz wav zip"
)
LFS_SUFFIXES = [f".{name}" for name in _BINARY.split()]
LFS_NUM_BYTES = 10_000_000
"""Files of this size are LFS whatever their name."""
_CHUNK_BYTES = 1 << 20


class HubError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what clients show.
        code: by which clients tell errors apart: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo.
        commit: that was looked into.
    """

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.commit = commit


class Readable(Protocol):
    """What a body is read from."""

    def read(self, num_bytes: int) -> bytes: ...


class Body:
    """The body of a request, and not a byte of the next one."""

    def __init__(self, stream: Any, num_bytes: int):
        self._stream, self.num_left = stream, num_bytes

    def read(self, num_bytes: int | None = None) -> bytes:
        wanted = self.num_left if num_bytes is None else min(num_bytes, self.num_left)
        content = self._stream.read(wanted) if wanted else b""
        if len(content) < wanted:
            raise ConnectionError("the client hung up")
        self.num_left -= wanted
        return content


@dataclass(frozen=True)
class File:
    """A file of a commit.

    Attributes:
        oid: SHA-1 of the git blob, which is a pointer for LFS.
        size: of the content in bytes.
        sha256: of the content, for LFS only.
        commit: that changed it last.
    """

    oid: str
    size: int
    sha256: str | None
    commit: str

    def describe(self, path: str) -> dict[str, Any]:
        """Return it as listings of a tree have it, without the last commit."""
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return {"type": "file", "path": path, "oid": self.oid, "size": self.size} | (
            {"lfs": lfs} if self.sha256 else {}
        )

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer."""
        return len(_pointer(self.sha256 or "", self.size))


@dataclass(frozen=True)
class Commit:
    """A state of all files, by path."""

    title: str
    message: str
    date: str
    author: str
    parent: str | None
    files: dict[str, File]


@dataclass
class Repository:
    """A model, dataset or Space repository. What changes it is on disk when the call returns.

    Attributes:
        folder: of its own.
        private: only its owner sees it.
        gated: only its owner may read its files.
        branches: last commit by name.
        tags: commit by name.
        commits: by id, oldest first.
        variables: of a Space, by name.
    """

    folder: Path
    private: bool = False
    gated: str | bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, author: str, private: bool = False) -> Repository:
        """Make a repository with a first commit, which says as on the Hub what is LFS."""
        (folder / "objects").mkdir(parents=True)
        repository = cls(folder, private)
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        content = base64.b64encode(rules.encode()).decode()
        operation = {"key": "file", "value": {"path": ".gitattributes", "content": content, "encoding": "base64"}}
        repository.commit(MAIN, author, {"summary": "initial commit"}, [operation])
        return repository

    @classmethod
    def open(cls, folder: Path) -> Repository:
        """Read a repository that was made before."""
        state = json.loads((folder / "repository.json").read_text())
        for commit_id, commit in state["commits"].items():
            files = {path: File(**file) for path, file in commit["files"].items()}
            state["commits"][commit_id] = Commit(**{**commit, "files": files})
        return cls(folder, **state)

    def save(self) -> None:
        """Write all but the contents, whole or not at all."""
        state = {key: value for key, value in dataclasses.asdict(self).items() if key != "folder"}
        part = self.folder / "repository.json.tmp"
        part.write_text(json.dumps(state))
        os.replace(part, self.folder / "repository.json")

    def resolve(self, revision: str) -> str:
        """Return the commit id of a branch, a tag, or an id of which at least seven characters are given."""
        for found in (self.branches.get(revision), self.tags.get(revision)):
            if found is not None:
                return found
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for commit_id in self.commits:
                if commit_id.startswith(revision):
                    return commit_id
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def listing(self, commit_id: str) -> list[dict[str, Any]]:
        """Return all files and folders of a commit, as listings of a tree have them."""
        found: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.commits[commit_id].files.items()):
            last = self.commits[file.commit]
            stamp = {"lastCommit": {"id": file.commit, "title": last.title, "date": last.date}}
            for folder in [str(parent) for parent in reversed(list(Path(path).parents)[:-1])]:
                oid = hashlib.sha1(f"{commit_id}:{folder}".encode()).hexdigest()
                found.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder} | stamp)
            found[path] = file.describe(path) | stamp
        return list(found.values())

    def content_path(self, file: File) -> Path:
        """Return where the content of a file is."""
        return self.object_path(file.sha256 or file.oid)

    def object_path(self, oid: str) -> Path:
        """Return where the content of this hash is, or would be."""
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", oid):
            raise HubError(422, f"Not an object id: {oid}")
        return self.folder / "objects" / oid

    def upload_mode(self, path: str, num_bytes: int) -> str:
        """Say whether a file is to be sent as `lfs` or with the commit, as `regular`."""
        return "lfs" if num_bytes >= LFS_NUM_BYTES or Path(path).suffix.lower() in LFS_SUFFIXES else "regular"

    def put_object(self, sha256: str, body: Readable) -> None:
        """Keep the content of an LFS file if it arrives whole and is what it is called."""
        path = self.object_path(sha256)
        part = path.with_name(f"{sha256}.{uuid.uuid4().hex}.tmp")
        digest = hashlib.sha256()
        try:
            with open(part, "wb") as file:
                while chunk := body.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise HubError(400, "The content does not have the SHA-256 it was announced with.")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def commit(self, branch: str, author: str, header: dict[str, Any], operations: list[dict[str, Any]]) -> str:
        """Apply the operations of a commit and return its id.

        Args:
            branch: that goes on to the new commit.
            author: user name.
            header: `summary`, `description`, `parentCommit`.
            operations: `{"key": kind, "value": {...}}` each, of the kinds file, lfsFile, deletedFile, deletedFolder.
        """
        if self.commits and branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = self.branches.get(branch)
        if header.get("parentCommit") and not (parent or "").startswith(header["parentCommit"]):
            raise HubError(412, f"The branch is at {parent}, not at {header['parentCommit']}.")
        commit_id = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        files = dict(self.commits[parent].files) if parent else {}
        for operation in operations:
            value = operation["value"]
            path = value["path"]
            if not path or path.startswith("/") or {"..", ".git", ""} & set(path.rstrip("/").split("/")):
                raise HubError(400, f"Invalid path: {path!r}")
            if operation["key"] == "file":
                files[path] = self._store(base64.b64decode(value["content"], validate=True), commit_id)
            elif operation["key"] == "lfsFile":
                files[path] = self._point_to(value["oid"], path, commit_id)
            elif operation["key"] in ("deletedFile", "deletedFolder"):
                inside = path.rstrip("/") + "/"
                gone = [p for p in files if p == path or (operation["key"] != "deletedFile" and p.startswith(inside))]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound", parent)
                for deleted in gone:
                    del files[deleted]
            else:
                raise HubError(400, f"Unknown operation: {operation['key']}")
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        title, message = header["summary"], header.get("description", "")
        self.commits[commit_id] = Commit(title, message, date, author, parent, files)
        self.branches[branch] = commit_id
        self.save()
        return commit_id

    def _store(self, content: bytes, commit_id: str) -> File:
        oid = _blob_oid(content)
        self.object_path(oid).write_bytes(content)
        return File(oid, len(content), None, commit_id)

    def _point_to(self, sha256: str, path: str, commit_id: str) -> File:
        content = self.object_path(sha256)
        if not content.is_file():
            raise HubError(400, f"LFS pointer of {path} points to an object that was not uploaded.")
        size = content.stat().st_size
        return File(_blob_oid(_pointer(sha256, size)), size, sha256, commit_id)


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
