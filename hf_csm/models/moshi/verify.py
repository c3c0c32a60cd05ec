"""Verify an export: load it through moshi's own loader and compare its logits with those of the trained model.

The trained model is loaded first and freed before the export is loaded, so one base model is in memory at a time.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from moshi.models import loaders
from moshi.models.lm import LMModel
from safetensors import safe_open

from hf_csm.hub import CONFIG_NAME, hub_errors
from hf_csm.models.family import Layout
from hf_csm.models.moshi.checkpoint import MoshiCheckpoint
from hf_csm.models.moshi.export import LORA_NAME, ExportError, check_adapter
from hf_csm.models.moshi.lora import load_adapter
from hf_csm.models.moshi.merge import WEIGHTS_NAME
from hf_csm.models.moshi.model import load_moshi


TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.25}
"""Largest difference of two logits, in standard deviations of all logits, that rounding explains in each dtype.

Rounding in bfloat16 hides a small adapter, so weights are also compared exactly."""
NUM_FRAMES = 16


def verify_export(
    folder: Path,
    adapter: Path,
    checkpoint: MoshiCheckpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Compare the export in `folder` with the trained model: weights exactly, logits on random codes up to rounding.

    An adapter is loaded as `moshi.server` loads it, fused. The weights of a merged model are compared when they are
    written, by `merge_adapter`.

    Args:
        folder: holds config.json with lora.safetensors or, merged, model.safetensors.
        adapter: folder of the PEFT adapter that was exported.
        checkpoint: its base model.

    Returns:
        The largest difference of two logits, in standard deviations of all logits.

    Raises:
        UserError: a file is missing or truncated.
        ExportError: they differ; the message gives the difference.
    """
    is_merged = (folder / WEIGHTS_NAME).is_file()
    tolerance = TOLERANCES[dtype]
    if is_merged:
        tolerance = max(tolerance, TOLERANCES[_stored_dtype(folder / WEIGHTS_NAME)])
    else:
        check_adapter(folder, adapter, checkpoint)
    with hub_errors(f"{folder / CONFIG_NAME}: "):
        exported = loaders.CheckpointInfo.from_hf_repo(
            checkpoint.name_or_path,
            moshi_weights=folder / WEIGHTS_NAME if is_merged else None,
            mimi_weights=checkpoint.mimi_weights,
            tokenizer=checkpoint.tokenizer,
            config_path=folder / CONFIG_NAME,
            mimi_config_path=folder / CONFIG_NAME,  # unused: the codec is not loaded
            lora_weights=None if is_merged else folder / LORA_NAME,
            revision=checkpoint.revision,
        )
    _free_memory()  # a run that has just ended may have left its model
    model = load_adapter(load_moshi(checkpoint, device=device, dtype=dtype), adapter).eval()
    codes = _random_codes(model.layout)
    expected = _logits(model.lm, codes.to(device))
    del model
    _free_memory()
    try:
        lm = exported.get_moshi(device=device, dtype=dtype, fuse_lora=True)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ExportError(f"moshi does not load {folder}: {' '.join(str(error).split())[:300]}") from error
    found = _logits(lm, codes.to(device))
    del lm
    _free_memory()
    difference = ((expected - found).abs().max() / expected.std()).item()
    if not difference <= tolerance:  # also true for NaN
        raise ExportError(
            f"{folder}, loaded by moshi, differs from the trained model: its logits are off by up to {difference:.3g} "
            f"standard deviations; rounding explains {tolerance}."
        )
    return difference


def _random_codes(layout: Layout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(layout.text_card, (1, 1, NUM_FRAMES), generator=generator)
    audio = torch.randint(layout.card, (1, layout.num_streams - 1, NUM_FRAMES), generator=generator)
    return torch.cat([text, audio], dim=1)


@torch.no_grad()
def _logits(lm: LMModel | torch.nn.Module, codes: torch.Tensor) -> torch.Tensor:
    output = lm(codes)
    logits = torch.cat([output.text_logits[output.text_mask].flatten(), output.logits[output.mask].flatten()])
    return logits.float().cpu()


def _stored_dtype(weights: Path) -> torch.dtype:
    with safe_open(weights, "pt") as file:
        return file.get_tensor("text_emb.weight").dtype


def _free_memory() -> None:
    gc.collect()  # PEFT's wrappers refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
