"""Encode JSONL manifests of dialogues, the format of moshi-finetune, before training opens its tables."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from hf_csm.config import DatasetConfig, RunConfig
from hf_csm.encode.compose import Composition
from hf_csm.encode.dialogues import encode_manifest
from hf_csm.mixture.windows import is_manifest, manifest_table, with_tables
from hf_csm.models.family import Checkpoint, Family


def encode_manifests(config: RunConfig, family: Family, base: Checkpoint, accelerator: Accelerator) -> DatasetConfig:
    """Return the dataset with each manifest replaced by a table of codes.

    The tables are in `<run_dir>/codes`; existing ones are not encoded again. All processes call this together.

    Raises:
        UserError: a manifest or one of its recordings cannot be read.
    """
    found: dict[str, str] = {}
    with_tables(config.dataset, lambda path: found.setdefault(path, path))
    manifests = [path for path in found if is_manifest(path)]
    if not manifests:
        return config.dataset
    codec = family.load_codec(base, "cpu" if accelerator.device.type == "cpu" else accelerator.device)
    duration_s = config.dataset.duration_sec
    for path in manifests:
        folder = manifest_table(path, config.run_dir, duration_s)
        encode_manifest(
            Path(path),
            folder,
            codec,
            family.codec_sha256(base),
            composition=Composition(duration_s=duration_s),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            progress=accelerator.is_main_process,
        )
        found[path] = str(folder)
    accelerator.wait_for_everyone()
    return with_tables(config.dataset, found.__getitem__)
