"""Models and tables by one name, a folder or `user/name` on the Hugging Face Hub, and errors of the Hub's client."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_csm.data.schema import SPLITS
from hf_csm.data.table import CARD_NAME, check_schema, read_card_metadata, split_files
from hf_csm.errors import UserError


if TYPE_CHECKING:
    from datasets import Features


TABLE_FILES = (CARD_NAME, "data/*/*.parquet", "plots/*")
"""Patterns of the files of a table in its repository; `*` includes subfolders."""
CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
EMOTIONS_NAME = "emotions.json"
MODEL_FILES = (CONFIG_NAME, ADAPTER_CONFIG_NAME, EMOTIONS_NAME)
"""Files that describe a model: all that `find_model` downloads by default."""
STAGES = {
    "prepared": ("a prepared corpus", "Run `hf-csm prepare` and name its output here."),
    "codes": ("a table of codes", "Run `hf-csm encode {name} --out ...` first."),
}
"""Stages of tables: what they are called, and the remedy where another table was given."""
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def find_model(name: str | Path, revision: str | None = None, *, files: Sequence[str] = ()) -> Path:
    """Return the folder of a model: `name` itself, or the cached copy of a model `user/name`, without its weights.

    A cached copy is complete: each of `MODEL_FILES` and `files` is there if the repository has it.

    Args:
        name: folder, or model on the Hub.
        revision: branch, tag or commit of the repository; its main branch by default.
        files: more files to download, as far as the repository has them.

    Raises:
        UserError: it is neither, may not be read, or is not in the cache and cannot be downloaded.
    """
    if not str(name):
        raise UserError("The name of a model is empty.", "Give a folder, or USER/NAME; an adapter names its base.")
    if (folder := _local_folder(str(name), revision, "model")) is not None:
        return folder
    with hub_errors(f"{name}: no such folder, and "):
        # This resolves the commit, which all other downloads then use, and works offline if the commit is cached.
        folder = _download(str(name), revision, "model", MODEL_FILES)
        for filename in (*MODEL_FILES, *files):
            fetch_file(str(name), filename, folder.name)
    return folder


def find_table(name: str, revision: str | None = None) -> Path:
    """Return the folder of a table: `name` itself, or the cached copy of a dataset `user/name`, downloaded if missing.

    Args:
        name: folder, or dataset on the Hub.
        revision: branch, tag or commit of the dataset; its main branch by default.

    Raises:
        UserError: it is neither, is no table of ours, may not be read, or is not in the cache and cannot be
            downloaded.
    """
    if (folder := _local_folder(name, revision, "table")) is not None:
        return folder
    folder = Path(name).expanduser()
    others = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, others, n=1, cutoff=0.75)
    prefix = f"{name}: no such folder{f' (did you mean {folder.parent / near[0]}?)' if near else ''}, and "
    with hub_errors(prefix):
        found = _download(name, revision, "dataset", TABLE_FILES)
    try:
        read_card_metadata(found)
    except UserError as error:
        raise UserError(
            f"{prefix}the Hub dataset is not a table of hf-csm.", "Name one that `hf-csm push-dataset` made."
        ) from error
    if not is_whole(found):  # offline, the client also returns an interrupted download
        raise UserError(
            f"{prefix}the cache has only a part of the Hub dataset.",
            "Run again with network and without HF_HUB_OFFLINE.",
        )
    return found


def fetch_file(repo_id: str, filename: str, revision: str | None = None) -> Path | None:
    """Return the cached copy of a file of a model repository, downloaded if missing; None if there is no such file.

    With a full commit id as `revision`, a cached file costs no request, nor does one that is known not to exist.

    Raises:
        UserError: it is not in the cache and the Hub cannot be reached.
        OSError: the Hub refuses; `hub_errors` converts it.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.file_download import REGEX_COMMIT_HASH

    if revision and REGEX_COMMIT_HASH.match(revision):
        cached = try_to_load_from_cache(repo_id, filename, revision=revision)
        if cached is not None:
            return None if cached is _CACHED_NO_EXIST else Path(str(cached))
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError, but the file may exist
        raise UserError(
            f"{repo_id}: {filename} is not in the cache and cannot be downloaded.",
            "Run again with network and without HF_HUB_OFFLINE: what has arrived is kept.",
        ) from error
    except EntryNotFoundError:
        return None


def split_url(url: str) -> tuple[str, str]:
    """Return repository and file of `hf://user/name/file`.

    Raises:
        UserError: it is not such a URL.
    """
    parts = url.removeprefix("hf://").split("/")
    if len(parts) < 3 or {"", ".", ".."} & set(parts):
        raise UserError(
            f"A config.json names {url!r}, which is no file of a Hub repository.", "Write it as hf://USER/NAME/FILE."
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def is_whole(table: Path) -> bool:
    """Return whether the Parquet files have the size that the card states for each split."""
    from huggingface_hub.repocard import metadata_load

    front = metadata_load(table / CARD_NAME) or {}
    try:
        stated = {split["name"]: split["num_bytes"] for split in front.get("dataset_info", {}).get("splits", [])}
    except (AttributeError, KeyError, TypeError):  # a damaged card
        return False
    names = {*SPLITS, *stated}  # a split that the card does not name has no files
    sizes = {name: sum(file.stat().st_size for file in split_files(table, name)) for name in names}
    return sizes == {name: stated.get(name, 0) for name in names}


def check_table(
    folder: Path, stage: str, features: Features, *, name: str | None = None, optional: Collection[str] = ()
) -> dict[str, Any]:
    """Check stage, files and schema of a table; return the metadata of its card.

    Args:
        stage: a key of `STAGES`.
        name: of the table, as the user gave it.
        optional: columns that a table of an earlier version may lack.

    Raises:
        UserError: the table is of another stage, incomplete (as after an interrupted copy), or has another schema.
    """
    name = name or str(folder)
    card = read_card_metadata(folder)
    if card.get("stage") != stage:
        kind, remedy = STAGES[stage]
        raise UserError(f"{name} is not {kind}.", remedy.format(name=name))
    if not is_whole(folder):
        raise UserError(
            f"{name}: not a whole table: its files are not those of its card.", "Copy it again, or make it again."
        )
    check_schema(folder, features, optional)
    return card


def _local_folder(name: str, revision: str | None, kind: str) -> Path | None:
    """Return the folder of this name; None if there is none, so that it may be on the Hub.

    Raises:
        UserError: it is a file, or a folder although a revision was given.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"{name} is a file, not the folder of a {kind}.", "Name its folder, or USER/NAME on the Hub.")
    if revision is not None:
        raise UserError(
            f"{name} is a folder, which has no revision {revision!r}.",
            f"Omit the revision, or name a {kind} on the Hub, USER/NAME.",
        )
    return folder


def _download(repo_id: str, revision: str | None, repo_type: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if repo_id.count("/") != 1 or repo_id.startswith((".", "~", "/")):
        raise HFValidationError(repo_id)
    return Path(snapshot_download(repo_id, repo_type=repo_type, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def hub_errors(prefix: str) -> Iterator[None]:
    """Convert errors of the Hub's client to `UserError`, without token or URL.

    Args:
        prefix: of the problem, as in `user/name: `.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        # The client wraps the cause in "not in the cache" and "error while uploading".
        is_wrapped = isinstance(error, (FileNotFoundError, RuntimeError)) and isinstance(error.__cause__, OSError)
        problem, remedy = _explain(error.__cause__ if is_wrapped and error.__cause__ else error)
        if not problem:
            raise
        raise UserError(f"{prefix}{problem}.", remedy) from error


def _explain(error: BaseException) -> tuple[str, str]:
    """Return problem and remedy; two empty strings for an unexpected error."""
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
