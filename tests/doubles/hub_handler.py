"""How the stand-in Hub answers: one method for each thing that clients ask for, and the table of addresses at the end.

Answers, headers and error codes are those that `huggingface_hub` and `datasets` read.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from tests.doubles.hub_card import card_problems, front_matter
from tests.doubles.hub_repository import MAIN, Body, HubError, Repository


if TYPE_CHECKING:
    from tests.doubles.hub import LocalHub, User


KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
"""Prefix of a repository's address by its kind."""


class HubHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection. A subclass has `hub`."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two wait for each other 40 ms
    hub: LocalHub
    body: Body

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""

    def serve(self) -> None:
        path, _, query = self.path.partition("?")
        self.hub.requests.append(f"{self.command} {path}")
        self.query = {key: values[-1] for key, values in parse_qs(query).items()}
        self.body = Body(self.rfile, int(self.headers.get("Content-Length") or 0))
        fails, status = self.hub.failure(self.command)
        if fails and status is None:
            self.body.read(self.body.num_left // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            if status is not None and fails:
                raise HubError(status, "The server was told to fail.")
            self.route(path)
        except HubError as error:
            found = {"X-Error-Code": error.code, "X-Error-Message": error.message, "X-Repo-Commit": error.commit}
            headers = {name: value for name, value in found.items() if value}
            self.send(error.status, {"error": error.message}, headers)
        while self.body.num_left:  # what nobody wanted to read is in front of the next request
            self.body.read(min(1 << 20, self.body.num_left))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def route(self, path: str) -> None:
        for methods, pattern, action in _ROUTES:
            match = pattern.fullmatch(path)
            if match and self.command in methods.split():
                return action(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        if re.match(r"/api/(models|datasets|spaces)/", path):
            raise self.not_found()
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_content(self, file: Path, headers: dict[str, str]) -> None:
        """Send a file or the range of it that is asked for."""
        size = file.stat().st_size
        first, end = 0, size
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted and wanted[1]:
            first, end = int(wanted[1]), min(size, int(wanted[2]) + 1 if wanted[2] else size)
        elif wanted:
            first = max(0, size - int(wanted[2]))
        if wanted and first >= end:
            return self.send(416, {"error": "Range not satisfiable"}, {"Content-Range": f"bytes */{size}"})
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{size}")
        plain = {"Content-Type": "application/octet-stream", "Content-Length": str(end - first)}
        for name, value in (plain | {"Accept-Ranges": "bytes"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(file, "rb") as stream:
            stream.seek(first)
            shutil.copyfileobj(Body(stream, end - first), self.wfile, 1 << 20)

    # Who asks, and what they may

    def user(self) -> User | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def not_found(self) -> HubError:
        # The real one says 401 to all who are not logged in: from its address alone, clients take that as "not found".
        return HubError(404 if self.user() else 401, "Repository not found", "RepoNotFound")

    def repository(self, kind: str, repo_id: str, *, write: bool = False) -> Repository:
        kind = next(k for k, prefix in KINDS.items() if kind in (k, prefix))
        user, found = self.user(), self.hub.repositories.get(f"{kind}/{repo_id}")
        owner = repo_id.partition("/")[0]
        if found is None or (found.private and (user is None or user.name != owner)):
            raise self.not_found()
        if write:
            self.check_writes(owner)
        return found

    def check_writes(self, owner: str) -> str:
        """Return the name of the user, who may write what belongs to `owner`."""
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user.name != owner or not user.can_write:
            raise HubError(403, f"You don't have the rights to write under the namespace {owner!r}")
        return user.name

    # What they ask for

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if user.can_write else "read"}
        auth = {"type": "access_token", "accessToken": token}
        self.send(200, {"type": "user", "name": user.name, "fullname": user.name, "orgs": [], "auth": auth})

    def create_or_delete(self) -> None:
        asked = json.loads(self.body.read())
        user = self.user()
        owner = asked.get("organization") or (user.name if user else "")
        author = self.check_writes(owner)
        kind, name = f"{asked.get('type') or 'model'}s", asked["name"]
        if not re.fullmatch(r"[\w][\w.-]{0,95}", name):
            raise HubError(400, f"Invalid repository name: {name!r}")
        key, url = f"{kind}/{owner}/{name}", f"{self.hub.endpoint}/{KINDS[kind]}{owner}/{name}"
        with self.hub.lock:
            found = self.hub.repositories.get(key)
            if self.command == "DELETE":
                if found is None:
                    raise self.not_found()
                shutil.rmtree(self.hub.repositories.pop(key).folder)
            elif found is not None:
                return self.send(409, {"error": "You already created this repository", "url": url})
            else:
                private = bool(asked.get("private"))
                self.hub.repositories[key] = Repository.create(self.hub.folder / key, author, private)
        self.send(200, {"url": url, "name": f"{owner}/{name}"})

    def validate_yaml(self) -> None:
        asked = json.loads(self.body.read())
        errors, warnings = card_problems(asked["content"], asked["repoType"])
        answer = {key: [{"message": m} for m in found] for key, found in (("errors", errors), ("warnings", warnings))}
        self.send(400 if errors else 200, answer)

    def info(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id)
        commit_id = repository.resolve(revision or MAIN)
        commit = repository.commits[commit_id]
        siblings = []
        for path, file in commit.files.items():
            entry: dict[str, Any] = {"rfilename": path}
            if self.query.get("blobs"):
                entry |= {"size": file.size, "blobId": file.oid}
                if file.sha256:
                    entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            siblings.append(entry)
        card: dict[str, Any] = {}
        if "README.md" in commit.files:
            card = front_matter(repository.content_path(commit.files["README.md"]).read_text(encoding="utf-8")) or {}
        answer: dict[str, Any] = {
            "id": repo_id,
            "author": repo_id.partition("/")[0],
            "sha": commit_id,
            "lastModified": commit.date,
        }
        answer |= {"private": repository.private, "gated": repository.gated, "disabled": False, "downloads": 0}
        self.send(200, answer | {"tags": card.get("tags", []), "cardData": card, "likes": 0, "siblings": siblings})

    def settings(self, kind: str, repo_id: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        asked = json.loads(self.body.read())
        repository.private = asked.get("private", repository.private)
        repository.gated = asked.get("gated", repository.gated)
        repository.save()
        self.send(200, {})

    def variables(self, repo_id: str) -> None:
        repository = self.repository("spaces", repo_id, write=True)
        asked = json.loads(self.body.read() or b"{}")
        if self.command == "POST":
            repository.variables[asked["key"]] = asked["value"]
        elif self.command == "DELETE":
            repository.variables.pop(asked["key"], None)
        repository.save()
        self.send(200, {key: {"value": value} for key, value in repository.variables.items()})

    def tree(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(kind, repo_id)
        commit_id = repository.resolve(revision)
        inside = f"{path}/" if path else ""
        is_recursive = self.query.get("recursive", "").lower() == "true"
        entries = [
            entry
            for entry in repository.listing(commit_id)
            if entry["path"].startswith(inside) and (is_recursive or "/" not in entry["path"][len(inside) :])
        ]
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound", commit_id)
        self.send(200, entries)

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id)
        asked = parse_qs(self.body.read().decode()).get("paths", [])
        paths = {path.rstrip("/") for path in asked}
        entries = repository.listing(repository.resolve(revision))
        self.send(200, [entry for entry in entries if entry["path"] in paths])

    def refs(self, kind: str, repo_id: str) -> None:
        repository = self.repository(kind, repo_id)

        def listing(folder: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": commit} for name, commit in refs.items()
            ]

        branches, tags = listing("heads", repository.branches), listing("tags", repository.tags)
        self.send(200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id)
        answer = []
        commit_id: str | None = repository.resolve(revision)
        while commit_id is not None:
            commit = repository.commits[commit_id]
            entry = {"id": commit_id, "title": commit.title, "message": commit.message, "date": commit.date}
            answer.append(entry | {"authors": [{"user": commit.author}]})
            commit_id = commit.parent
        self.send(200, answer)

    def branch(self, kind: str, repo_id: str, name: str) -> None:
        asked = json.loads(self.body.read() or b"{}")
        self.change_ref(kind, repo_id, "branch", name, asked.get("startingPoint", MAIN))

    def tag(self, kind: str, repo_id: str, name: str) -> None:  # a tag to delete, a revision to put one on
        asked = json.loads(self.body.read() or b"{}")
        self.change_ref(kind, repo_id, "tag", asked.get("tag", name), name)

    def change_ref(self, kind: str, repo_id: str, kind_of_ref: str, name: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        refs = repository.branches if kind_of_ref == "branch" else repository.tags
        with self.hub.lock:
            if self.command == "POST" and name in refs:
                raise HubError(409, f"Reference already exists: {name}")
            if self.command == "POST":
                refs[name] = repository.resolve(revision)
            elif name not in refs or name == MAIN:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            else:
                del refs[name]
            repository.save()
        self.send(200, {})

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        present = repository.commits[repository.resolve(revision)].files
        answer = []
        for file in json.loads(self.body.read())["files"]:
            path, found = file["path"], present.get(file["path"])
            mode = repository.upload_mode(path, file["size"])
            entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answer.append(entry | ({"oid": found.sha256 or found.oid} if found else {}))
        self.send(200, {"files": answer})

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        asked = json.loads(self.body.read())
        if asked["operation"] != "upload" or "basic" not in asked.get("transfers", ["basic"]):
            raise HubError(422, "Only basic uploads are known here.")
        verify = {"href": f"{self.hub.endpoint}/{kind}{repo_id}.git/info/lfs/verify"}
        objects = []
        for entry in asked["objects"]:
            found = repository.object_path(entry["oid"]).is_file()
            upload = {"href": self.object_url(kind, repo_id, entry["oid"])}
            objects.append(entry | ({} if found else {"actions": {"upload": upload, "verify": verify}}))
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, kind: str, repo_id: str) -> None:
        asked = json.loads(self.body.read())
        path = self.repository(kind, repo_id, write=True).object_path(asked["oid"])
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise HubError(404, f"Object {asked['oid']} was not received.")
        self.send(200, {})

    def object_url(self, kind: str, repo_id: str, sha256: str) -> str:
        """Return where the content of an LFS file is sent to and fetched from, without a token as at the real one."""
        name = next(name for name, prefix in KINDS.items() if kind in (name, prefix))
        return f"{self.hub.endpoint}/lfs/{name}/{repo_id}/{sha256}?signature={self.hub.signature}"

    def object(self, kind: str, repo_id: str, sha256: str) -> None:
        repository = self.hub.repositories.get(f"{kind}/{repo_id}")
        if self.query.get("signature") != self.hub.signature or repository is None:
            raise HubError(403, "Access denied")
        path = repository.object_path(sha256)
        if self.command == "PUT":
            repository.put_object(sha256, self.body)
            self.send(200, {})
        elif path.is_file():
            self.send_content(path, {"ETag": f'"{sha256}"'})
        else:
            raise HubError(404, "No such object")

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repository = self.repository(kind, repo_id, write=True)
        author = self.check_writes(repo_id.partition("/")[0])
        lines = [json.loads(line) for line in self.body.read().splitlines() if line]
        header, operations = lines[0]["value"], lines[1:]
        if self.query.get("create_pr"):
            raise HubError(400, "Pull requests are not known here.")
        with self.hub.lock:
            commit_id = repository.commit(revision, author, header, operations)
        url = f"{self.hub.endpoint}/{KINDS[kind]}{repo_id}/commit/{commit_id}"
        self.send(200, {"success": True, "commitOid": commit_id, "commitUrl": url, "hookOutput": ""})

    def file(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(kind, repo_id)
        user = self.user()
        if repository.gated and (user is None or user.name != repo_id.partition("/")[0]):
            raise HubError(403 if user else 401, f"Access to {repo_id} is restricted.", "GatedRepo")
        commit_id = repository.resolve(revision)
        found = repository.commits[commit_id].files.get(path)
        if found is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit_id)
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{found.oid}"'}
        if found.sha256 is None:
            return self.send_content(repository.content_path(found), headers)
        headers |= {"Location": self.object_url(kind, repo_id, found.sha256)}
        headers |= {"X-Linked-Etag": f'"{found.sha256}"', "X-Linked-Size": str(found.size)}
        self.send(302, {}, headers)


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_GIT = r"/(?P<kind>datasets/|spaces/|)(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = [
    (methods, re.compile(pattern), action)
    for methods, pattern, action in (
        ("GET", r"/api/whoami-v2", HubHandler.whoami),
        ("POST", r"/api/repos/create", HubHandler.create_or_delete),
        ("DELETE", r"/api/repos/delete", HubHandler.create_or_delete),
        ("POST", r"/api/validate-yaml", HubHandler.validate_yaml),
        ("GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", HubHandler.info),
        ("PUT", _API + r"/settings", HubHandler.settings),
        ("GET POST DELETE", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables", HubHandler.variables),
        ("GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", HubHandler.tree),
        ("POST", _API + r"/paths-info/(?P<revision>[^/]+)", HubHandler.paths_info),
        ("GET", _API + r"/refs", HubHandler.refs),
        ("GET", _API + r"/commits/(?P<revision>[^/]+)", HubHandler.commits),
        ("POST DELETE", _API + r"/branch/(?P<name>[^/]+)", HubHandler.branch),
        ("POST DELETE", _API + r"/tag/(?P<name>[^/]+)", HubHandler.tag),
        ("POST", _API + r"/preupload/(?P<revision>[^/]+)", HubHandler.preupload),
        ("POST", _API + r"/commit/(?P<revision>[^/]+)", HubHandler.commit),
        ("POST", _GIT + r"\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
        ("POST", _GIT + r"\.git/info/lfs/verify", HubHandler.lfs_verify),
        ("GET HEAD", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubHandler.file),
        ("PUT GET HEAD", r"/lfs/(?P<kind>[^/]+)/(?P<repo_id>[^/]+/[^/]+)/(?P<sha256>[^/]+)", HubHandler.object),
    )
]
