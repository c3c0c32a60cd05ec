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
from hf_csm.hub import hub_errors
from hf_csm.models.family import RuntimeAdapter
from hf_csm.models.moshi.pull import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    EMOTIONS_NAME,
    check_safe,
    fetch_file,
    find_folder,
    split_name,
    weight_names,
)


CONSOLIDATED_NAME = "consolidated"
"""Folder of a training checkpoint with the files that moshi loads."""
LORA_KEYS = ("lora", "lora_name", "lora_rank", "lora_scaling")
"""What an adapter's config.json has beside the keys of its base."""


@dataclass
class MoshiCheckpoint(loaders.CheckpointInfo):
    """moshi's `CheckpointInfo`, which also remembers what it was asked for.

    Attributes:
        name_or_path: Hub repository, or absolute path of the local folder.
        revision: of the Hub repository, if one was asked for.
    """

    name_or_path: str = ""
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.name_or_path).is_absolute()


def find_checkpoint(repo_or_folder: str, revision: str | None = None) -> MoshiCheckpoint:
    """Find the files of a checkpoint: on the Hub (downloaded if need be), or in a folder of the same layout.

    Names in config.json mean files of its folder; `hf://user/repo/file` and `file:///path` mean what they say. A
    repository that is named so is taken at the revision that the adapter was trained on, else at its main branch.
    Of a training checkpoint, `consolidated/` is taken. A Hub repository without config.json is taken for Moshi 7B.

    Args:
        revision: of the Hub repository itself; says nothing of others that its config.json names.

    Raises:
        UserError: a file is missing or unreadable, or a repository cannot be reached.
    """
    folder = find_folder(repo_or_folder, revision)
    if not Path(repo_or_folder).expanduser().is_dir():
        return _find_files(folder, repo_or_folder, revision)
    folder = folder.resolve()
    if (folder / CONSOLIDATED_NAME).is_dir() and not (folder / CONFIG_NAME).is_file():
        folder = folder / CONSOLIDATED_NAME
    return _find_files(folder, str(folder), None)


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
    revisions = _base_revisions(folder, name_or_path)
    paths = {
        key: _resolve(str(name), folder, key, name_or_path, revisions) for key, name in weight_names(config).items()
    }
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


def _resolve(name: str, folder: Path, key: str, name_or_path: str, revisions: dict[str, str]) -> Path:
    """Return the file that `name` means in the config.json of `folder`, downloaded if it is on the Hub."""
    if name.startswith("hf://"):
        repo_id, filename = split_name(name)
        check_safe(key, name, name_or_path)
        problem = f"{name_or_path}/config.json names {name} ({key}), which cannot be had: "
        with hub_errors(problem):
            fetched = fetch_file(repo_id, filename, revisions.get(repo_id))
        if fetched is None:
            raise UserError(f"{problem}the Hub repository has no such file.", "Correct the name in config.json.")
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
        name: what to call the adapter in messages.

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
        split_name(moshi_name)[0] if moshi_name.startswith("hf://") else str(checkpoint.moshi_weights.parent)
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
    """Return a config.json without moshi's keys of an adapter."""
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
            f"{checkpoint.mimi_weights} is damaged or cut short: {error}", "Copy or download it again."
        ) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"{checkpoint.mimi_weights} does not fit its config: " + " ".join(str(error).split())[:300],
            "Take Mimi's weights and its config from the same place.",
        ) from error
    mimi.set_num_codebooks(mimi.total_codebooks)
    return mimi


def codec_sha256(checkpoint: loaders.CheckpointInfo) -> str:
    """Return a hash that two checkpoints share if and only if their Mimis give the same codes.

    It covers the bytes of the weights and the values of the config, whatever its order or spacing.
    """
    config = checkpoint.mimi_config if checkpoint.mimi_config is not None else loaders._mimi_config
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    with open(checkpoint.mimi_weights, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of this name; by default a GPU if there is one.

    Raises:
        UserError: it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used: {reason}", "Give cpu, or cuda with a GPU.") from error
    return device
