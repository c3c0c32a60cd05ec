"""Publish on the Hugging Face Hub: a table with its card, if its licence lets it, checked after the upload."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hf_csm.data.corpus import all_builders
from hf_csm.data.hub import TABLE_FILES, hub_errors, is_whole
from hf_csm.data.schema import SPLITS
from hf_csm.data.table import CARD_NAME, read_card_metadata, read_columns, split_files
from hf_csm.errors import UserError


if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile


UNSTATED_LICENSES = (None, "", "other", "unknown")
_MADE_BY_HUB = {".gitattributes"}


def push_table(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a prepared or codes table with its card in one commit, and return its address.

    Run again after an interruption, it sends only what has not arrived. What the repository has besides the card,
    `data/` and `plots/` stays.

    Args:
        folder: of the table.
        repo_id: `user/name`; made if it does not exist.
        private: whether a repository that is made is private; one that exists has to be so already.
        revision: branch to push to, made if it does not exist; the main one by default.

    Raises:
        UserError: the licence forbids it or is not stated, the table is not whole, the repository holds something
            else, or the Hub cannot be reached, does not know the user or does not let him write.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    folder = Path(folder)
    metadata = check_publishable(folder)
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} is not the name of a Hub repository.", "Give USER/NAME, as in ann/ravdess.")
    if get_token() is None:
        raise UserError(
            f"{repo_id}: you are not logged in to the Hub.",
            "Run `hf auth login` with a token that may write, or set HF_TOKEN.",
        )
    api = HfApi()
    with hub_errors(f"{repo_id}: "):
        present = _open_repository(api, repo_id, private, revision, metadata)
        additions = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in table_files(folder)]
        sent = {addition.path_in_repo for addition in additions}
        stale = [
            CommitOperationDelete(file.path) for file in present if _is_of_table(file.path) and file.path not in sent
        ]
        commit = api.create_commit(
            repo_id,
            [*stale, *additions],
            commit_message=f"Upload {metadata['corpus']}, {metadata['stage']}",
            repo_type="dataset",
            revision=revision,
        )
        _check_arrived(additions, _list_files(api, repo_id, commit.oid), repo_id)
    return f"{api.endpoint}/datasets/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")


def table_files(folder: Path) -> list[Path]:
    """Return what is published of a table: its card, its Parquet files and its plots."""
    plots = sorted(file for file in (folder / "plots").rglob("*") if file.is_file() and not file.name.startswith("."))
    return [folder / CARD_NAME, *(file for split in SPLITS for file in split_files(folder, split)), *plots]


def check_publishable(folder: Path) -> dict[str, Any]:
    """Return the card's metadata of a table that may be published.

    What the rows say counts as much as the card: an edited card does not make a corpus free.

    Raises:
        UserError: it may not, its licence is not stated, or it is not a whole table of ours.
    """
    from huggingface_hub.repocard import metadata_load

    metadata = read_card_metadata(folder)
    named = metadata.get("corpus")
    again = "Prepare or encode it again; its card and its files belong together."
    if metadata.get("stage") not in ("prepared", "codes") or not is_whole(folder):
        raise UserError(f"{folder}: not a whole table: files are missing or changed.", again)
    rows = read_columns([file for file in table_files(folder) if file.suffix == ".parquet"], ["corpus"])
    in_rows = set(rows["corpus"].unique().to_pylist()) if rows.column_names else set()
    builders = {builder.NAME: builder for builder in all_builders()}
    for corpus in sorted({str(name) for name in (*in_rows, named, metadata.get("builder"))}):
        builder = builders.get(corpus)
        if builder is not None and builder.NOT_TO_BE_PUBLISHED is not None:
            reason = builder.NOT_TO_BE_PUBLISHED.strip().rstrip(".")
            raise UserError(
                f"{folder}: {builder.TITLE} may not be published: {reason}.",
                f"Keep this table; others make it from their own copy of the corpus ({builder.HOMEPAGE}).",
            )
    if in_rows != {named}:
        found = ", ".join(sorted(map(str, in_rows)))
        raise UserError(f"{folder}: the card names the corpus {named}, the rows {found}.", again)
    card = folder / CARD_NAME
    stated = (metadata_load(card) or {}).get("license")
    builder = builders.get(str(named))
    if builder is None:
        if stated in UNSTATED_LICENSES:
            raise UserError(
                f"{folder}: the licence of the corpus {named} is not stated.",
                "State it in `hf-csm prepare csv_manifest --license cc-by-4.0`; a dialogue manifest cannot state one.",
            )
    elif stated != builder.LICENSE or builder.NOTICE not in card.read_text(encoding="utf-8").split("---\n", 2)[2]:
        raise UserError(f"{folder}: the card has lost the licence or the notice that {builder.TITLE} asks for.", again)
    return metadata


def _open_repository(
    api: HfApi, repo_id: str, private: bool, revision: str | None, metadata: dict[str, Any]
) -> list[RepoFile]:
    """Make the repository and the branch if need be, and return the files that are there."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.repo_info(repo_id, repo_type="dataset")
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        info = api.repo_info(repo_id, repo_type="dataset")
    if private and not info.private:
        raise UserError(f"{repo_id}: exists and is public.", "Make it private in its settings, or name another one.")
    try:
        files = _list_files(api, repo_id, revision)
    except RevisionNotFoundError:
        files = _list_files(api, repo_id, None)
        _check_same_table(api, repo_id, None, files, metadata)
        api.create_branch(repo_id, branch=str(revision), repo_type="dataset")
    else:
        _check_same_table(api, repo_id, revision, files, metadata)
    return files


def _list_files(api: HfApi, repo_id: str, revision: str | None) -> list[RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type="dataset")
    return [entry for entry in tree if isinstance(entry, RepoFile)]


def _check_same_table(
    api: HfApi, repo_id: str, revision: str | None, files: list[RepoFile], metadata: dict[str, Any]
) -> None:
    """Raise if the repository has anything but an earlier state of this table."""
    names = {file.path for file in files} - _MADE_BY_HUB
    if not names:
        return
    found: dict[str, Any] = {}
    if CARD_NAME in names:
        with tempfile.TemporaryDirectory() as beside:  # a card alone in the cache would pass for the whole table
            api.hf_hub_download(repo_id, CARD_NAME, repo_type="dataset", revision=revision, local_dir=beside)
            try:
                found = read_card_metadata(beside)
            except UserError:
                found = {}
    mine, theirs = ([card.get("corpus"), card.get("stage")] for card in (metadata, found))
    if mine != theirs:
        what = f"{theirs[0]}, {theirs[1]}" if found else "something other than a table of hf-csm"
        raise UserError(
            f"{repo_id}: the repository exists and holds {what}.", "Name another one; this one is left as it is."
        )


def _is_of_table(path: str) -> bool:
    return any(fnmatch(path, pattern) for pattern in TABLE_FILES)


def _check_arrived(additions: Iterable[CommitOperationAdd], files: list[RepoFile], repo_id: str) -> None:
    """Raise unless the files of the table on the Hub are those that were sent, by size and hash."""
    from huggingface_hub.utils.sha import git_hash

    arrived = {file.path: (file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files}
    expected = {}
    for addition in additions:
        info, path = addition.upload_info, addition.path_in_repo
        in_git = len(arrived.get(path, (0, ""))[1]) == 40  # a SHA-1; the files sent so are small
        oid = git_hash(Path(str(addition.path_or_fileobj)).read_bytes()) if in_git else info.sha256.hex()
        expected[path] = (info.size, oid)
    wrong = [path for path in expected if arrived.get(path) != expected[path]]
    wrong += [path for path in arrived if _is_of_table(path) and path not in expected]
    if wrong:
        raise UserError(
            f"{repo_id}: {len(wrong)} files on the Hub are not what was sent, such as {wrong[0]}.",
            "Run the same command again; what is right is not sent again.",
        )
