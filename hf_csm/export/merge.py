"""From a PEFT adapter to a whole model: merged weights under moshi's names, checked by loading them back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from moshi.models import loaders
from safetensors import safe_open
from safetensors.torch import save_file

from hf_csm.export.native import CONFIG_NAME, ExportError, compare_logits, replaced_folder, serving_config
from hf_csm.models.lora import merged, native_lm
from hf_csm.models.moshi import MoshiCheckpoint, MoshiLM


WEIGHTS_NAME = "model.safetensors"


def export_merged(model: MoshiLM, checkpoint: MoshiCheckpoint, out: Path) -> Path:
    """Write the merged weights and their config.json to the folder `out`, replacing what is there, and check them.

    Args:
        checkpoint: the base model; its Mimi and tokenizer are named, not copied.

    Raises:
        ExportError: what moshi loads from `out` is not the trained model.
    """
    with replaced_folder(out) as beside:
        write_merged(model, checkpoint, beside)
    return out


def write_merged(model: MoshiLM, checkpoint: MoshiCheckpoint, folder: Path) -> None:
    """Do what `export_merged` does, in a folder that is there already."""
    dtype = weights_dtype(checkpoint)
    state = {name: weight.to("cpu", dtype).contiguous() for name, weight in merged(model).state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    config = serving_config(checkpoint) | {"moshi_name": WEIGHTS_NAME}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    verify_merged(folder, model, checkpoint)


def verify_merged(folder: Path, model: MoshiLM, checkpoint: MoshiCheckpoint) -> float:
    """Load the merged weights in `folder` through moshi and compare them with the trained `model`.

    Returns:
        The largest difference of two logits, in standard deviations of all logits: what rounding costs.

    Raises:
        ExportError: a weight is not the merged one rounded once, or the logits differ by more than rounding explains.
    """
    found = loaders.CheckpointInfo.from_hf_repo(
        checkpoint.name_or_path,
        moshi_weights=folder / WEIGHTS_NAME,
        config_path=folder / CONFIG_NAME,
        revision=checkpoint.revision,
    )
    lm, dtype = native_lm(model), weights_dtype(checkpoint)
    loaded = found.get_moshi(device=lm.device, dtype=lm.dtype)
    weights = loaded.state_dict()
    for name, weight in merged(model).state_dict().items():
        if not torch.equal(weights[name], weight.to(dtype).to(lm.dtype)):
            raise ExportError(f"{folder / WEIGHTS_NAME}: {name} is not the merged weight.")
    return compare_logits(loaded, model, str(folder / WEIGHTS_NAME), dtype=dtype)


def weights_dtype(checkpoint: MoshiCheckpoint) -> torch.dtype:
    """Return the dtype of the language model's weights in the files of `checkpoint`."""
    with safe_open(checkpoint.moshi_weights, "pt") as file:
        return file.get_tensor("text_emb.weight").dtype
