"""Tables from the Hugging Face Hub, by the same name as everywhere: a folder or `user/name`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_csm.data.schema import SPLITS
from hf_csm.data.table import CARD_NAME, read_card_metadata, split_files
from hf_csm.errors import UserError


TABLE_FILES = (CARD_NAME, "data/*/*.parquet", "plots/*")
"""Patterns of what is of a table in its repository; `*` takes subfolders too."""
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def find_table(name: str, revision: str | None = None) -> Path:
    """Return the folder of a table: `name` itself, or the cached copy of a dataset `user/name`, fetched if need be.

    Args:
        name: folder, or dataset on the Hub.
        revision: branch, tag or commit of the dataset; its main branch by default.

    Raises:
        UserError: it is neither, is no table of ours, may not be read, or is not in the cache and cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and revision is None:
        return folder
    if folder.exists():
        what = (
            f"a folder, which has no revision {revision!r}" if folder.is_dir() else "a file, and a table is a folder"
        )
        raise UserError(f"{name} is {what}.", "Name the folder of a table, or a dataset on the Hub as user/name.")
    others = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, others, n=1, cutoff=0.75)
    prefix = f"{name}: no such folder{f' (did you mean {folder.parent / near[0]}?)' if near else ''}, and "
    with hub_errors(prefix):
        found = _fetch(name, revision)
    try:
        read_card_metadata(found)
    except UserError as error:
        raise UserError(
            f"{prefix}the Hub dataset is not a table of hf-csm.", "Name one that `hf-csm push-dataset` made."
        ) from error
    if not is_whole(found):  # without network, the client takes what an interrupted download has left
        raise UserError(
            f"{prefix}the cache has only a part of the Hub dataset.",
            "Run again with network and without HF_HUB_OFFLINE.",
        )
    return found


def is_whole(table: Path) -> bool:
    """Say whether the Parquet files have the size that the card states for each split."""
    from huggingface_hub.repocard import metadata_load

    front = metadata_load(table / CARD_NAME) or {}
    stated = {split["name"]: split["num_bytes"] for split in front.get("dataset_info", {}).get("splits", [])}
    names = {*SPLITS, *stated}  # a split that the card does not name has no files
    sizes = {name: sum(file.stat().st_size for file in split_files(table, name)) for name in names}
    return sizes == {name: stated.get(name, 0) for name in names}


def check_whole(table: Path, name: str | None = None) -> None:
    """Check that a table is whole: what a copy has left out would be missed by nobody.

    Args:
        name: of the table, as the user gave it.

    Raises:
        UserError: it is not.
    """
    if not is_whole(table):
        raise UserError(
            f"{name or table}: not a whole table: its files are not those of its card.",
            "Copy it again, or make it again.",
        )


def _fetch(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if repo_id.count("/") != 1:
        raise HFValidationError(repo_id)
    return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision, allow_patterns=list(TABLE_FILES)))


@contextmanager
def hub_errors(prefix: str) -> Iterator[None]:
    """Turn what the Hub's client raises into `UserError`, without token or address.

    Args:
        prefix: of the problem, as in `user/name: `.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # The client wraps what went wrong in "not in the cache" and "error while uploading".
        is_wrapped = isinstance(error, (FileNotFoundError, RuntimeError)) and isinstance(error.__cause__, OSError)
        problem, remedy = _explain(error.__cause__ if is_wrapped and error.__cause__ else error)
        if not problem:
            raise
        raise UserError(f"{prefix}{problem}.", remedy) from error


def _explain(error: BaseException) -> tuple[str, str]:
    """Return problem and remedy; two empty strings for what is nobody's but ours."""
    import requests
    from huggingface_hub import errors, get_token

    again = "run again: what has arrived is kept."
    if isinstance(error, errors.HFValidationError):
        return "it is not the name of a Hub repository", "Give USER/NAME, of letters, digits and - _ . only."
    if isinstance(error, errors.GatedRepoError):
        return "the Hub repository is gated", f"Accept its terms on its page, then {_LOGIN}."
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = "that your account may see it" if get_token() else f"if it is private, {_LOGIN}"
        return "the Hub has no such repository that you may see", f"Check the spelling, and {remedy}."
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub repository has no such revision", "Give a branch, tag or commit that its page lists."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the Hub is switched off by HF_HUB_OFFLINE", f"Unset HF_HUB_OFFLINE and {again}"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept your token", f"For a new one, {_LOGIN}."
        if status == 403:
            return "your token may not do this on the Hub", f"With a token that may write there, {_LOGIN}."
        return f"the Hub answered HTTP {status}", f"Wait a little and {again}"
    if isinstance(error, (requests.RequestException, errors.LocalEntryNotFoundError)):
        return f"the Hub cannot be reached ({type(error).__name__})", f"Check the network and {again}"
    if isinstance(error, OSError):
        what = f"{error.filename or 'a file'}: {error.strerror or type(error).__name__}"
        return (
            f"a file cannot be read or written ({what})",
            f"Free space or set HF_HOME to another folder, and {again}",
        )
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        lines = [line.strip("- ") for line in str(error).splitlines()[1:]]
        return (
            f"the Hub refuses the card: {'; '.join(lines)[:300]}",
            "Correct these values where the card has them from.",
        )
    return "", ""
