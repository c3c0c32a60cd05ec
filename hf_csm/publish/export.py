"""Export a trained adapter to a folder that serves, verified by loading it back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_csm.errors import UserError
from hf_csm.files import read_json, replaced_folder, write_text_atomic
from hf_csm.hub import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CONFIG_NAME, EMOTIONS_NAME
from hf_csm.mixture.provenance import read_corpora
from hf_csm.models import get_family
from hf_csm.models.emotion_control import read_emotion_control, write_emotion_control
from hf_csm.models.family import Checkpoint, Family
from hf_csm.publish.run_artifacts import RUN_FILES, SAMPLES_NAME, copy_run_files, run_folder
from hf_csm.publish.trained import Trained, find_trained


def export_checkpoint(
    checkpoint: str | Path,
    out: Path,
    *,
    revision: str | None = None,
    merged: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Export a trained adapter to a folder that serves, and verify it by loading it back.

    Merged weights are written piece by piece. The export is then loaded back and compared with the trained model; one
    base model is in memory at a time.

    Args:
        checkpoint: `checkpoint_000500/`, whose `adapter/` holds the PEFT adapter and names the base model, a folder
            with such an adapter in it, or a Hub repository of one.
        out: folder for the PEFT adapter and the family's own files for it, or with `merged` the merged weights, with
            `emotions.json`, `corpora.json`, and the run's options, metrics and samples if there are any.
        revision: of the Hub repository.
        device: on which the trained model and its export are compared.
        dtype: in which they are compared.

    Raises:
        UserError: a file is missing or truncated, the base is not available, `out` holds something else, or the
            export differs from the trained model.
    """
    trained = find_trained(checkpoint, revision)
    if trained.adapter is None:
        raise UserError(f"{checkpoint} is a merged model, not an adapter.", "Export the checkpoint it was made from.")
    family = get_family(trained.base, trained.base_revision)
    ours = {*family.adapter_files, *family.merged_files, ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, EMOTIONS_NAME}
    with replaced_folder(out, {*ours, *RUN_FILES, SAMPLES_NAME, "README.md"}, EMOTIONS_NAME) as beside:
        base = write_verified(family, trained, beside, merged=merged, device=device, dtype=dtype)
        corpora = read_corpora(run_folder(trained.folder))
        base_model = None if base.is_local else base.name_or_path
        copy_run_files(trained.folder, beside, corpora=corpora, base_model=base_model)
    return out


def write_verified(
    family: Family,
    trained: Trained,
    folder: Path,
    *,
    merged: bool,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
) -> Checkpoint:
    """Write an adapter, or with `merged` the merged weights, with `emotions.json`, and verify them by loading them.

    Args:
        family: of the base model.
        folder: exists and is empty.

    Returns:
        The base model.

    Raises:
        UserError: a file is missing or truncated, the base is not available, or what was written differs from the
            trained model.
    """
    assert trained.adapter is not None
    base = family.find_checkpoint(trained.base, trained.base_revision)
    write = family.merge_adapter if merged else family.export_adapter
    write(trained.adapter, base, folder)
    family.verify_export(folder, trained.adapter, base, device=device, dtype=dtype)
    if not merged:
        shutil.copyfile(trained.adapter / ADAPTER_CONFIG_NAME, folder / ADAPTER_CONFIG_NAME)
        shutil.copyfile(trained.adapter / ADAPTER_WEIGHTS_NAME, folder / ADAPTER_WEIGHTS_NAME)
    write_emotion_control(read_emotion_control(trained.folder), folder)
    merged_sha256 = hash_merged(family, folder) if merged else None
    set_base(folder, base.name_or_path, base.revision, merged_sha256=merged_sha256)
    return base


def set_base(
    folder: Path, name: str, revision: str | None, *, urls: Mapping[str, str] | None = None, **control: Any
) -> None:
    """Replace name and revision of the base model in the files of an export.

    Args:
        urls: new URLs in config.json by the old ones.
        control: other attributes to replace in `emotions.json`.
    """
    emotion_control = read_emotion_control(folder)
    write_emotion_control(
        dataclasses.replace(emotion_control, base_model=name, base_revision=revision, **control), folder
    )
    changes: dict[str, dict[str, Any]] = {ADAPTER_CONFIG_NAME: {"base_model_name_or_path": name, "revision": revision}}
    if urls:
        config = read_json(folder / CONFIG_NAME)
        changes[CONFIG_NAME] = {
            key: urls[value] for key, value in config.items() if isinstance(value, str) and value in urls
        }
    for filename, change in changes.items():
        if (folder / filename).is_file():
            write_text_atomic(folder / filename, json.dumps(read_json(folder / filename) | change, indent=2) + "\n")


def hash_merged(family: Family, folder: Path) -> str:
    """Return the SHA-256 of a merged model: all files, without the URLs in config.json, which a push replaces."""
    digest = hashlib.sha256()
    for name in family.merged_files:
        if name == CONFIG_NAME:
            config = {key: value for key, value in read_json(folder / name).items() if "://" not in str(value)}
            digest.update(json.dumps(config, sort_keys=True).encode())
        else:
            with open(folder / name, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()
