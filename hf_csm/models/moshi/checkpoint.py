"""Moshi's checkpoints: find their files, load the codec and the tokenizer."""

from __future__ import annotations

import copy
import filecmp
import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from moshi.models import loaders
from moshi.models.compression import MimiModel
from safetensors import SafetensorError

from hf_csm.errors import UserError
from hf_csm.hub import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    EMOTIONS_NAME,
    fetch_file,
    find_model,
    hub_errors,
    split_url,
)
from hf_csm.models.family import RuntimeAdapter


CONSOLIDATED_NAME = "consolidated"
"""Folder of a training checkpoint with the files that moshi loads."""
DEFAULT_NAMES = {
    "moshi_name": loaders.MOSHI_NAME,
    "mimi_name": loaders.MIMI_NAME,
    "tokenizer_name": loaders.TEXT_TOKENIZER_NAME,
}
"""File names of a checkpoint whose config.json does not give them."""
BASE_KEYS = (*DEFAULT_NAMES, "mimi_config_name")
"""Keys of config.json that name files of the base, which an adapter's config.json names too."""
LORA_KEYS = ("lora", "lora_name", "lora_rank", "lora_scaling")
"""Keys of an adapter's config.json that its base does not have."""


@dataclass
class MoshiCheckpoint(loaders.CheckpointInfo):
    """moshi's `CheckpointInfo` with the name and revision that were requested.

    Attributes:
        name_or_path: Hub repository, or absolute path of the local folder.
        revision: of the Hub repository, if one was given.
    """

    name_or_path: str = ""
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.name_or_path).is_absolute()


def find_checkpoint(repo_or_folder: str, revision: str | None = None) -> MoshiCheckpoint:
    """Find the files of a checkpoint: on the Hub (downloaded if need be), or in a folder of the same layout.

    Names in config.json are relative to its folder, or URLs: `hf://user/repo/file`, `file:///path`. A repository in a
    URL is read at the revision that the adapter was trained on, else at its main branch. Of a training checkpoint,
    `consolidated/` is used. A Hub repository without config.json has the architecture of Moshi 7B.

    Args:
        revision: of the Hub repository itself, not of others that its config.json names.

    Raises:
        UserError: a file is missing or unreadable, or a repository cannot be reached.
    """
    folder = find_model(repo_or_folder, revision)
    if not Path(repo_or_folder).expanduser().is_dir():
        return _find_files(folder, repo_or_folder, revision)
    folder = folder.resolve()
    if (folder / CONSOLIDATED_NAME).is_dir() and not (folder / CONFIG_NAME).is_file():
        folder = folder / CONSOLIDATED_NAME
    return _find_files(folder, str(folder), None)


def base_urls(repo_or_folder: str, revision: str | None = None) -> tuple[str, list[str]]:
    """Return the URL, `hf://` or `file://`, of the weights of a language model, and those of its other files.

    Nothing is downloaded but config.json.

    Raises:
        UserError: config.json is missing or unreadable.
    """
    folder = find_model(repo_or_folder, revision)
    name_or_path = str(folder.resolve()) if Path(repo_or_folder).expanduser().is_dir() else repo_or_folder
    is_default = not (folder / CONFIG_NAME).is_file() and not Path(name_or_path).is_absolute()
    urls = named_urls(name_or_path, {} if is_default else _read_json(folder / CONFIG_NAME, name_or_path))
    return urls.pop("moshi_name"), list(urls.values())


def named_urls(name_or_path: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the URLs of the files of a base, by their keys in config.json; moshi's defaults for missing keys."""
    place = f"file://{name_or_path}" if Path(name_or_path).is_absolute() else f"hf://{name_or_path}"
    names = DEFAULT_NAMES | {key: str(config[key]) for key in BASE_KEYS if config.get(key)}
    return {key: name if "://" in name else f"{place}/{name}" for key, name in names.items()}


def _find_files(folder: Path, name_or_path: str, revision: str | None) -> MoshiCheckpoint:
    """Find the files that the config.json of `folder` names.

    Args:
        folder: local, or the cached copy of the repository `name_or_path`.
    """
    is_local = Path(name_or_path).is_absolute()
    has_config, has_adapter = ((folder / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME))
    if not has_config and has_adapter:
        raise UserError(
            f"{name_or_path} is a PEFT adapter without config.json and lora.safetensors, which moshi loads.",
            f"Make them with `hf-csm export {name_or_path} --out DIR`, and name DIR.",
        )
    config = _read_json(folder / CONFIG_NAME, name_or_path) if has_config or is_local else {}
    names = DEFAULT_NAMES | {key: str(config[key]) for key in (*BASE_KEYS, "lora_name") if config.get(key)}
    for key, name in names.items():
        _check_name(key, name, name_or_path)
    revisions = _base_revisions(folder, name_or_path)
    paths = {key: _resolve(key, name, folder, name_or_path, revisions) for key, name in names.items()}
    if not has_config:
        files = paths["moshi_name"], paths["mimi_name"], paths["tokenizer_name"]
        return MoshiCheckpoint(*files, name_or_path=name_or_path, revision=revision)
    if "mimi_config_name" in paths:
        _read_json(paths["mimi_config_name"], name_or_path)
    found = loaders.CheckpointInfo.from_hf_repo(
        name_or_path,
        moshi_weights=paths["moshi_name"],
        mimi_weights=paths["mimi_name"],
        tokenizer=paths["tokenizer_name"],
        config_path=folder / CONFIG_NAME,
        mimi_config_path=paths.get("mimi_config_name"),
        lora_weights=paths.get("lora_name"),
    )
    return MoshiCheckpoint(**vars(found), name_or_path=name_or_path, revision=revision)


def _base_revisions(folder: Path, name_or_path: str) -> dict[str, str]:
    """Return the revision of the base model's repository, by its name, if an adapter or merge records one."""
    for path, name_key, revision_key in (
        (folder / ADAPTER_CONFIG_NAME, "base_model_name_or_path", "revision"),
        (folder.parent / "adapter" / ADAPTER_CONFIG_NAME, "base_model_name_or_path", "revision"),
        (folder / EMOTIONS_NAME, "base_model", "base_revision"),
    ):
        is_beside = path.parent != folder
        if path.is_file() and (not is_beside or folder.name == CONSOLIDATED_NAME):
            record = _read_json(path, name_or_path)
            if record.get(name_key) and record.get(revision_key):
                return {str(record[name_key]): str(record[revision_key])}
    return {}


def _read_json(path: Path, name_or_path: str) -> dict[str, Any]:
    if not path.is_file():
        runs = sorted(path.parent.glob("checkpoint_*/consolidated"))
        raise UserError(
            f"{name_or_path} has no {path.name}.",
            f"It is the folder of a run: name one of its checkpoints, such as {runs[-1].parent}."
            if runs
            else "A base folder holds config.json, the weights of Moshi and Mimi and the tokenizer, as on the Hub.",
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not JSON: {error}", "Copy it again from where the checkpoint came from."
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.", "Copy it again from where the checkpoint came from.")
    return value


def _check_name(key: str, name: str, name_or_path: str) -> None:
    """Check a file name in a config.json.

    Of the Hub, weights must be in safetensors, since unpickling can run code, and local files must not be named.
    """
    is_local = Path(name_or_path).is_absolute()
    problem = None
    is_weights = key in ("moshi_name", "mimi_name", "lora_name")
    if is_weights and (not is_local or name.startswith("hf://")) and not name.endswith(".safetensors"):
        problem = "which is not in safetensors; other formats can run code when they are loaded"
    if not is_local and name.startswith("file://"):
        problem = "a file on another machine"
    if not is_local and "://" not in name and {"", ".", ".."} & set(name.split("/")):
        problem = "which is outside of the repository"
    if problem:
        raise UserError(
            f"{name_or_path}: config.json names {name} ({key}), {problem}.",
            "Correct the name, or ask the owner of the repository to correct it.",
        )


def _resolve(key: str, name: str, folder: Path, name_or_path: str, revisions: dict[str, str]) -> Path:
    """Return the file that `name` refers to in the config.json of `folder`, downloaded if it is on the Hub."""
    is_relative = "://" not in name
    if name.startswith("hf://") or (is_relative and not Path(name_or_path).is_absolute()):
        repo_id, filename = (name_or_path, name) if is_relative else split_url(name)
        problem = f"{name_or_path}: {name} ({key} of config.json) is not available: "
        with hub_errors(problem):
            fetched = fetch_file(repo_id, filename, folder.name if is_relative else revisions.get(repo_id))
        if fetched is None:
            raise UserError(
                f"{problem}the Hub repository {repo_id} has no such file.",
                "Name a repository with a Moshi model or adapter, or correct the name in its config.json.",
            )
        return fetched
    path = Path(name.removeprefix("file://")) if name.startswith("file://") else folder / name
    if not path.is_file():
        raise UserError(
            f"{path} is missing; {name_or_path}/config.json names it as {key}.",
            "Copy the file there, or correct the name in config.json.",
        )
    return path


def split_adapter(checkpoint: MoshiCheckpoint, name: str) -> tuple[MoshiCheckpoint, RuntimeAdapter | None]:
    """Return the checkpoint of the base, and the adapter on it; None for a base or merged model.

    Args:
        name: of the adapter in messages.

    Raises:
        UserError: config.json has no rank or scaling.
    """
    if checkpoint.lora_weights is None:
        return checkpoint, None
    config = checkpoint.raw_config or {}
    try:
        rank, scaling = int(config["lora_rank"]), float(config["lora_scaling"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint.name_or_path}: config.json has no lora_rank or lora_scaling.", "Export the adapter again."
        ) from error
    base = copy.copy(checkpoint)
    moshi_name = str(config.get("moshi_name", ""))
    base.name_or_path = (
        split_url(moshi_name)[0] if moshi_name.startswith("hf://") else str(checkpoint.moshi_weights.parent)
    )
    base.lora_weights, base.revision = None, None
    base.lm_config = None if checkpoint.lm_config is None else without_lora(checkpoint.lm_config)
    base.raw_config = None if checkpoint.raw_config is None else without_lora(checkpoint.raw_config)
    return base, RuntimeAdapter(name, checkpoint.lora_weights, rank, scaling)


def is_same_base(checkpoint: MoshiCheckpoint, other: MoshiCheckpoint) -> bool:
    """Return whether two checkpoints, of adapters or whole models, have the same base."""
    # The first repositories have no config.json, but adapters of them do.
    configs = [without_lora(one.lm_config or loaders._lm_kwargs) for one in (checkpoint, other)]
    weights, other_weights = checkpoint.moshi_weights, other.moshi_weights
    is_same_file = weights.resolve() == other_weights.resolve()
    return configs[0] == configs[1] and (is_same_file or filecmp.cmp(weights, other_weights, shallow=False))


def without_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without moshi's adapter keys."""
    return {key: value for key, value in config.items() if key not in LORA_KEYS}


def load_tokenizer(checkpoint: loaders.CheckpointInfo) -> sentencepiece.SentencePieceProcessor:
    """Load the text tokenizer."""
    try:
        return checkpoint.get_text_tokenizer()
    except RuntimeError as error:
        raise UserError(
            f"{checkpoint.tokenizer} is not a SentencePiece model.", "Copy or download the tokenizer again."
        ) from error


def load_mimi(checkpoint: loaders.CheckpointInfo, device: torch.device | str = "cpu") -> MimiModel:
    """Load Mimi with all the codebooks it has; `set_num_codebooks` leaves some out."""
    try:
        mimi = loaders.get_mimi(checkpoint.mimi_weights, checkpoint.mimi_config, device=device)
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint.mimi_weights} is damaged or truncated: {error}", "Copy or download it again."
        ) from error
    except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"{checkpoint.mimi_weights} does not fit its config: "
            + (" ".join(str(error).split())[:300] or type(error).__name__),
            "Take Mimi's weights and its config from the same place.",
        ) from error
    mimi.set_num_codebooks(mimi.total_codebooks)
    return mimi


def codec_sha256(checkpoint: loaders.CheckpointInfo) -> str:
    """Return a hash that two checkpoints share if and only if their Mimis give the same codes.

    It covers the bytes of the weights and the values of the config; order and spacing do not matter.
    """
    config = checkpoint.mimi_config if checkpoint.mimi_config is not None else loaders._mimi_config
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    with open(checkpoint.mimi_weights, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
