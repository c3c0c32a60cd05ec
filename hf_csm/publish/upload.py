"""Send files to a repository of the Hugging Face Hub in one commit, and see that they arrived: what every push shares.

Large files are sent before the commit and kept by the Hub under their hash. So a push that was stopped at any moment
has changed nothing, and the next one sends only what is missing.
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
"""Raises `UserError` if the files of these names at that revision are not an earlier push of the same thing."""


@dataclass(frozen=True)
class Target:
    """Where a push goes.

    Attributes:
        repo_id: `user/name`.
        repo_type: `model` or `dataset`.
        patterns: of the files that are ours there; all others stay as they are.
        private: whether a repository that is made is private; one that exists has to be so already.
        revision: branch, made if it does not exist; None for the main one.
    """

    repo_id: str
    repo_type: str
    patterns: tuple[str, ...]
    private: bool = False
    revision: str | None = None

    def has(self, path: str) -> bool:
        """Say whether a file of the repository is ours."""
        return any(fnmatch(path, pattern) for pattern in self.patterns)


def log_in(repo_id: str, example: str) -> HfApi:
    """Return the Hub's client for a user who is logged in.

    Raises:
        UserError: nobody is, or `repo_id` is not the name of a repository, such as `example`.
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
    """Make the repository and the branch if need be, and return the files that are there.

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
    """Ask the Hub how it would take a file, which it tells only those who may send one; nothing is sent.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the user may not write there.
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
    """Make `files`, by their paths in the repository, what it has of ours, in one commit; return its address.

    Args:
        present: files that `open_repository` found.
        message: of the commit.

    Raises:
        UserError: what arrived is not what was sent.
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
    """Return the hash of a local file that is to be compared with `oid`, which the Hub gives one of its files.

    Large files go by the SHA-256 of their content, those kept in git by the SHA-1 of their blob.
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
    """Raise unless our files on the Hub are those that were sent, by size and hash."""
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
            f"{target.repo_id}: {len(wrong)} files on the Hub are not what was sent, such as {wrong[0]}.",
            "Run the same command again; what is right is not sent again.",
        )
