"""Models from the Hugging Face Hub, by the same name as everywhere: a folder or `user/name`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moshi.models import loaders

from hf_csm.errors import UserError
from hf_csm.hub import hub_errors


CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
EMOTIONS_NAME = "emotions.json"
SMALL_NAMES = (CONFIG_NAME, ADAPTER_CONFIG_NAME, EMOTIONS_NAME)
"""What is always fetched of a repository that has it."""
DEFAULT_NAMES = {
    "moshi_name": loaders.MOSHI_NAME,
    "mimi_name": loaders.MIMI_NAME,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
}
"""File names of a checkpoint whose config.json does not give them."""
NAME_KEYS = (*DEFAULT_NAMES, "mimi_config_name", "lora_name")


def find_folder(
    repo_or_folder: str | Path, revision: str | None = None, *, weights: bool = True, also: Sequence[str] = ()
) -> Path:
    """Return the folder of a model: as it is if local, else the cached copy of a Hub repository, fetched if need be.

    Of a repository, the small files come and the weights that its config.json names, all of one commit; nothing else.
    What other repositories it names (`hf://`) stays there. What is in the cache needs no network.

    Args:
        repo_or_folder: folder, or `user/name` of a model on the Hub.
        revision: branch, tag or commit of the repository; its main branch by default.
        weights: whether those that config.json names are wanted.
        also: more files that are wanted, as far as the repository has them.

    Raises:
        UserError: it is neither, may not be read, or is not whole in the cache and cannot be fetched.
    """
    name, folder = str(repo_or_folder), Path(repo_or_folder).expanduser()
    if not name:
        raise UserError("The name of a model is empty.", "Give a folder, or USER/NAME; an adapter names its base.")
    if folder.is_dir() and revision is None:
        return folder
    if folder.exists():
        what = (
            f"a folder, which has no revision {revision!r}" if folder.is_dir() else "a file, and a model is a folder"
        )
        remedy = "Leave --revision out." if folder.is_dir() else "Name its folder, or a repository on the Hub."
        raise UserError(f"{name} is {what}.", remedy)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(
            f"There is no folder {name}, and it is not the name of a Hub repository either.",
            "Give a folder with a model's files, or a repository such as kyutai/moshiko-pytorch-bf16.",
        )
    with hub_errors(f"{name}: no such folder, and "):
        return _fetch(name, revision, weights, also)


def fetch_file(repo_id: str, filename: str, revision: str | None = None) -> Path | None:
    """Return the cached copy of a file of a Hub repository, fetched if need be; None if the repository lacks it.

    With a whole commit id as `revision`, nothing is asked for that is in the cache, and that a file is not there is
    remembered too.

    Raises:
        OSError: it is not in the cache and cannot be fetched; `data.hub.hub_errors` says why.
    """
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from huggingface_hub.file_download import REGEX_COMMIT_HASH

    if revision and REGEX_COMMIT_HASH.match(revision):
        known = try_to_load_from_cache(repo_id, filename, revision=revision)
        if known is not None:
            return None if known is _CACHED_NO_EXIST else Path(str(known))
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except LocalEntryNotFoundError:  # a kind of EntryNotFoundError, but nobody knows whether the file exists
        raise
    except EntryNotFoundError:
        return None


def split_name(name: str) -> tuple[str, str]:
    """Return repository and file of `hf://user/name/file`.

    Raises:
        UserError: it is not such a name.
    """
    parts = name.removeprefix("hf://").split("/")
    if len(parts) < 3 or {"", ".", ".."} & set(parts):
        raise UserError(
            f"A config.json names {name!r}, which is no file of a Hub repository.", "Write it as hf://USER/NAME/FILE."
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def check_safe(key: str, name: str, of_whom: str) -> None:
    """Check that weights from the Hub are in safetensors: to read others can run what their author wrote into them.

    Raises:
        UserError: they are not.
    """
    if key in ("moshi_name", "mimi_name", "lora_name") and not name.endswith(".safetensors"):
        raise UserError(
            f"{of_whom}: config.json names {name} ({key}), which is not in safetensors.",
            "Take weights in safetensors; others could run programs on this machine.",
        )


def weight_names(config: dict[str, str] | None) -> dict[str, str]:
    """Return the files that a config.json names, by its keys; None stands for the first repositories, without one."""
    return DEFAULT_NAMES | {key: config[key] for key in NAME_KEYS if config.get(key)} if config else DEFAULT_NAMES


def _fetch(repo_id: str, revision: str | None, weights: bool, also: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # This finds the commit, of which all else is then asked for, and does without network if need be.
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(SMALL_NAMES)))
    commit = folder.name
    try:
        present = {name for name in (*SMALL_NAMES, *also) if fetch_file(repo_id, name, commit)}
        if not weights:
            names = []
        elif CONFIG_NAME in present:
            named = weight_names(_read_names(folder / CONFIG_NAME))
            for key, name in named.items():
                check_safe(key, name, repo_id)
                if name.startswith("file://"):
                    raise UserError(
                        f"{repo_id}: config.json names {name}, a place on somebody's machine.",
                        "Tell its owner, who may push again with --base-model USER/NAME.",
                    )
            names = [name for name in named.values() if "://" not in name]
        elif ADAPTER_CONFIG_NAME in present:
            names = [ADAPTER_WEIGHTS_NAME]
        else:
            names = list(DEFAULT_NAMES.values())
        outside = [name for name in names if {"", ".", ".."} & set(name.split("/"))]
        if outside:
            raise UserError(
                f"{repo_id}: config.json names {outside[0]}, which is outside of the repository.",
                "Tell the owner of the repository.",
            )
        missing = [name for name in names if fetch_file(repo_id, name, commit) is None]
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo_id}: the cache has only a part of the Hub repository, and the rest cannot be fetched.",
            "Run again with network and without HF_HUB_OFFLINE: what has arrived is kept.",
        ) from error
    if missing:
        is_named = CONFIG_NAME in present
        raise UserError(
            f"{repo_id}: the Hub repository has no {missing[0]}, "
            + ("which its config.json names." if is_named else "nor a config.json that names another file."),
            "Name a repository with a Moshi model or adapter in it.",
        )
    return folder


def _read_names(path: Path) -> dict[str, str]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON: {' '.join(str(error).split())}", "Tell the owner of the repository."
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object.", "Tell the owner of the repository.")
    return {key: config[key] for key in NAME_KEYS if isinstance(config.get(key), str)}
