"""Export a trained adapter to a folder that serves, verified by loading it back."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from hf_csm.files import replaced_folder
from hf_csm.mixture.provenance import CORPORA_NAME, read_corpora
from hf_csm.models.emotion_control import read_emotion_control, write_emotion_control
from hf_csm.models.moshi.checkpoint import find_checkpoint
from hf_csm.models.moshi.export import LORA_NAME, export_adapter, find_adapter, named_base
from hf_csm.models.moshi.lora import read_adapter
from hf_csm.models.moshi.merge import merge_adapter
from hf_csm.models.moshi.pull import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, CONFIG_NAME, EMOTIONS_NAME, find_folder
from hf_csm.models.moshi.verify import verify_export
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
    """Export a trained adapter to a folder that serves, and verify it by loading it back.

    Merged weights are written piece by piece. The export is then loaded back and compared with the trained model; one
    base model is in memory at a time.

    Args:
        checkpoint: `checkpoint_000500/`, whose `adapter/` holds the PEFT adapter and names the base model, a folder
            with such an adapter in it, or a Hub repository of one.
        out: folder for the PEFT adapter and moshi's files for it, or with `merged` the merged weights, with
            `emotions.json`, `corpora.json`, and the run's options, metrics and samples if there are any.
        revision: of the Hub repository.
        device: on which the trained model and its export are compared.
        dtype: in which they are compared.

    Raises:
        UserError: a file is missing or truncated, the base is not available, or `out` holds something else.
        ExportError: the export differs from the trained model.
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
            export_adapter(adapter, base, beside)
        verify_export(beside, adapter, base, device=device, dtype=dtype)
        if not merged:
            config.base_model_name_or_path, config.revision = base.name_or_path, base.revision
            config.save_pretrained(str(beside))
            shutil.copyfile(adapter / ADAPTER_WEIGHTS_NAME, beside / ADAPTER_WEIGHTS_NAME)
        control = dataclasses.replace(control, base_model=base.name_or_path, base_revision=base.revision)
        write_emotion_control(control, beside)
        run_dir = run_folder(folder)
        corpora = read_corpora(run_dir) if (run_dir / CORPORA_NAME).is_file() else []  # older runs have none
        base_model = None if base.is_local else base.name_or_path
        copy_run_files(folder, beside, corpora=corpora, base_model=base_model)
    return out
