"""A trained adapter to a folder that serves, loaded back before it is in its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hf_csm.files import replaced_folder
from hf_csm.mixture.provenance import CORPORA_NAME, read_corpora
from hf_csm.models.emotion_control import read_emotion_control, write_emotion_control
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import LORA_NAME, find_adapter, named_base, verify_native, write_native
from hf_csm.models.moshi.lora import load_adapter, read_adapter, save_adapter
from hf_csm.models.moshi.merge import merge_adapter
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.pull import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CONFIG_NAME, EMOTIONS_NAME, find_folder
from hf_csm.publish.run_artifacts import RUN_FILES, SAMPLES_NAME, copy_run_files, run_folder


EXPORTED_NAMES = {
    LORA_NAME,
    CONFIG_NAME,
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    EMOTIONS_NAME,
    *RUN_FILES,
    SAMPLES_NAME,
    "model.safetensors",
    "README.md",
}


def export_checkpoint(
    checkpoint: str | Path,
    out: Path,
    *,
    revision: str | None = None,
    merged: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Export a trained adapter to a folder that serves, and load it back before returning it.

    Merged weights are written and compared piece by piece, so that a model that fills the memory can be merged.

    Args:
        checkpoint: `checkpoint_000500/`, whose `adapter/` holds the PEFT adapter and names the base model, a folder
            with such an adapter in it, or a Hub repository of one.
        out: gets the PEFT adapter and moshi's files for it, or with `merged` the merged weights; also what emotions
            it knows (`emotions.json`), whose speech it learned from (`corpora.json`), the run's options, metrics and
            samples, as far as they are there.
        revision: of the Hub repository.
        dtype: in which the trained model and its exported adapter are compared.

    Raises:
        UserError: a file is missing or cut short, or the base cannot be had, or `out` holds something else.
        ExportError: the export is not the trained model.
    """
    folder = find_folder(checkpoint, revision, weights=False, also=(ADAPTER_WEIGHTS_NAME, *RUN_FILES))
    adapter = find_adapter(folder, str(checkpoint))
    control = read_emotion_control(folder)
    config, _ = read_adapter(adapter)
    base = find_checkpoint(named_base(adapter, config), config.revision)
    with replaced_folder(out, EXPORTED_NAMES) as beside:
        if merged:
            merge_adapter(adapter, base, beside)
        else:
            model = load_adapter(load_moshi(base, device=device, dtype=dtype), adapter)
            save_adapter(model, beside)
            write_native(model, base, beside)
            verify_native(beside, model, base)
        control = dataclasses.replace(control, base_model=base.name_or_path, base_revision=base.revision)
        write_emotion_control(control, beside)
        run_dir = run_folder(folder)
        corpora = read_corpora(run_dir) if (run_dir / CORPORA_NAME).is_file() else []  # runs of before have none
        base_model = None if base.is_local else base.name_or_path
        copy_run_files(folder, beside, corpora=corpora, base_model=base_model)
    return out
