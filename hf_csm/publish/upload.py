"""Upload files to a repository of the Hugging Face Hub in one commit, and verify them there.

Large files are sent before the commit and stored by hash. An interrupted push changes nothing, and the next one sends
only the missing files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from hf_csm.errors import UserError


if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

MADE_BY_HUB = {".gitattributes"}

CheckContents = Callable[["HfApi", "str | None", "set[str]"], None]
"""Raises `UserError` unless the files with these names at that revision are an earlier push of the same kind."""


@dataclass(frozen=True)
class Target:
    """The target of a push.

    Attributes:
        repo_id: `user/name`.
        repo_type: `model` or `dataset`.
        patterns: of the files that a push may replace or delete; all others stay.
        private: create the repository as private; an existing one must be private.
        revision: branch, created if missing; None for the main branch.
    """

    repo_id: str
    repo_type: str
    patterns: tuple[str, ...]
    private: bool = False
    revision: str | None = None

    def has(self, path: str) -> bool:
        """Return whether a push may replace or delete this file."""
        return any(fnmatch(path, pattern) for pattern in self.patterns)


def log_in(repo_id: str, example: str) -> HfApi:
    """Return the Hub's client of the logged-in user.

    Raises:
        UserError: not logged in, or `repo_id` is not the name of a repository, such as `example`.
    """
    from huggingface_hub import HfApi, get_token

    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} is not the name of a Hub repository.", f"Give USER/NAME, as in {example}.")
    if get_token() is None:
        raise UserError(
            f"{repo_id}: you are not logged in to the Hub.",
            "Run `hf auth login` with a token that may write, or set HF_TOKEN.",
        )
    return HfApi()


def open_repository(api: HfApi, target: Target, check_contents: CheckContents) -> list[RepoFile]:
    """Create the repository and the branch if missing, and return the existing files.

    Raises:
        UserError: it is public and should not be, or holds something else.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repo_id, repo_type = target.repo_id, target.repo_type
    if (target.revision or "").startswith("refs/"):
        raise UserError(
            f"{repo_id}: {target.revision} is not the name of a branch.", "Give a branch, such as v1, to push to."
        )
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type=repo_type, private=target.private, exist_ok=True)
        info = api.repo_info(repo_id, repo_type=repo_type)
    if target.private and not info.private:
        raise UserError(f"{repo_id}: exists and is public.", "Make it private in its settings, or name another one.")
    revision = target.revision
    is_new_branch = False
    try:
        files = list_files(api, target, revision)
    except RevisionNotFoundError:
        files, revision, is_new_branch = list_files(api, target, None), None, True
    names = {file.path for file in files} - MADE_BY_HUB
    if names:
        check_contents(api, revision, names)
    if is_new_branch:
        api.create_branch(repo_id, branch=str(target.revision), repo_type=repo_type)
    return files


def check_may_write(api: HfApi, target: Target) -> None:
    """Check for write permission by asking the Hub how to upload a file; nothing is sent.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: no write permission.
    """
    from huggingface_hub import CommitOperationAdd

    api.preupload_lfs_files(
        target.repo_id,
        [CommitOperationAdd("README.md", b"\n")],
        repo_type=target.repo_type,
        revision=target.revision,
    )


def list_files(api: HfApi, target: Target, revision: str | None) -> list[RepoFile]:
    """Return all files of the repository at a revision."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(target.repo_id, recursive=True, revision=revision, repo_type=target.repo_type)
    return [entry for entry in tree if isinstance(entry, RepoFile)]


def send_files(
    api: HfApi, target: Target, files: Mapping[str, Path], present: Sequence[RepoFile], message: str
) -> str:
    """Replace the files of `target` by `files`, given by their paths in the repository, in one commit; return its URL.

    Args:
        present: files that `open_repository` found.
        message: of the commit.

    Raises:
        UserError: the files on the Hub differ from those sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(path, file) for path, file in files.items()]
    stale = [CommitOperationDelete(file.path) for file in present if target.has(file.path) and file.path not in files]
    commit = api.create_commit(
        target.repo_id,
        [*stale, *additions],
        commit_message=message,
        repo_type=target.repo_type,
        revision=target.revision,
    )
    _check_arrived(additions, list_files(api, target, commit.oid), target)
    place = "datasets/" if target.repo_type == "dataset" else ""
    branch = f"/tree/{quote(target.revision, safe='')}" if target.revision else ""
    return f"{api.endpoint}/{place}{target.repo_id}{branch}"


def file_oid(path: Path, oid: str) -> str:
    """Return the hash of a local file for comparison with `oid`, the Hub's hash of a file.

    Large files have the SHA-256 of their content, those in git the SHA-1 of their blob.
    """
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    if len(oid) == 40:  # these are small
        return git_hash(path.read_bytes())
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def oid_of(file: RepoFile) -> str:
    """Return the hash of a file on the Hub, as `file_oid` does."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def _check_arrived(additions: Sequence[CommitOperationAdd], files: Sequence[RepoFile], target: Target) -> None:
    """Raise unless the files on the Hub are those sent, by size and hash."""
    arrived = {file.path: (file.size, oid_of(file)) for file in files}
    expected = {}
    for addition in additions:
        info, path = addition.upload_info, addition.path_in_repo
        in_git = len(arrived.get(path, (0, ""))[1]) == 40
        oid = file_oid(Path(str(addition.path_or_fileobj)), "0" * 40) if in_git else info.sha256.hex()
        expected[path] = (info.size, oid)
    wrong = [path for path in expected if arrived.get(path) != expected[path]]
    wrong += [path for path in arrived if target.has(path) and path not in expected]
    if wrong:
        raise UserError(
            f"{target.repo_id}: {len(wrong)} files on the Hub differ from those sent, such as {wrong[0]}.",
            "Run the same command again; correct files are not sent again.",
        )
