"""Public run artifacts: options without local paths, metrics, samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import yaml

from hf_csm.corpora import all_builders
from hf_csm.errors import UserError
from hf_csm.files import read_yaml
from hf_csm.mixture.provenance import CORPORA_NAME, CorpusTerms, write_corpora
from hf_csm.publish.card import COPY_AGAIN, MEASURES, read_numbers, read_results
from hf_csm.training.plots import plot_losses


CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"
SAMPLES_NAME = "samples"
MEASURED_NAMES = tuple(f"{name}.json" for name in MEASURES)
RUN_FILES = (CONFIG_NAME, METRICS_NAME, PLOT_NAME, CORPORA_NAME, *MEASURED_NAMES)
"""All but the samples."""
PATH_OPTIONS = ("run_dir", "resume_from_checkpoint", "manifest_path", "val_manifest_path", "path")
"""Options that may hold a relative path, which looks like a Hub name."""
MAX_SAMPLE_S = 300.0
"""Longest sample to publish."""


def run_folder(checkpoint: Path) -> Path:
    """Return the folder with the files of the run: the parent of a training checkpoint, else the export itself."""
    checkpoint = Path(checkpoint).resolve()
    if checkpoint.name in ("adapter", "consolidated"):
        checkpoint = checkpoint.parent
    return checkpoint.parent if (checkpoint / "adapter").is_dir() else checkpoint


def copy_run_files(
    checkpoint: Path, folder: Path, *, corpora: Sequence[CorpusTerms], base_model: str | None = None
) -> None:
    """Copy those of `RUN_FILES` that exist, and the samples, of a training checkpoint or an export to `folder`.

    Args:
        corpora: training data.
        base_model: repository of the base model, for the configuration (default: as configured).

    Raises:
        UserError: a file is damaged.
    """
    run = run_folder(checkpoint)
    if corpora:
        write_corpora(corpora, folder)
    if (run / CONFIG_NAME).is_file():
        config = public_config(read_yaml(run / CONFIG_NAME, COPY_AGAIN), corpora, base_model)
        (folder / CONFIG_NAME).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if (run / METRICS_NAME).is_file():
        lines = read_numbers(run / METRICS_NAME)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / METRICS_NAME).write_text(text, encoding="utf-8")
        if any("loss" in line or "eval_loss" in line for line in lines):
            plot_losses(lines, folder / PLOT_NAME, "Loss")
    for name in MEASURED_NAMES:
        if (checkpoint / name).is_file():
            results = read_results(checkpoint / name)
            (folder / name).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    _copy_samples(run, folder)


def public_config(
    config: dict[str, Any], corpora: Sequence[CorpusTerms], base_model: str | None = None
) -> dict[str, Any]:
    """Return a run's options with local paths cut to their last part; Hub names stay.

    Args:
        corpora: training data: their `table` tells Hub names from folders.
    """
    on_hub = {terms.table for terms in corpora} | {base_model}

    def walk(node: Any, option: str = "") -> Any:
        if isinstance(node, dict):
            return {name: walk(value, name) for name, value in node.items()}
        if isinstance(node, list):
            return [walk(value, option) for value in node]
        if not isinstance(node, str) or node in on_hub:
            return node
        is_path = option in PATH_OPTIONS or node.startswith(("/", "~", "./", "../", "file:")) or "\\" in node
        return Path(node).name if is_path else node

    public: dict[str, Any] = walk(config)
    if base_model is not None:
        public.setdefault("moshi_paths", {})["hf_repo_id"] = base_model
    return public


def _copy_samples(run: Path, folder: Path) -> None:
    """Copy the clips of `samples/`, which must be generated speech.

    Raises:
        UserError: a file is named like a clip of a corpus, or has a second channel, which may hold one.
    """
    remedy = f"Keep only generated mono clips in {run / SAMPLES_NAME}, as generate_samples.py writes them."
    corpora = [builder for builder in all_builders() if builder.FILE_NAME is not None]
    for path in sorted((run / SAMPLES_NAME).rglob("*.wav")):
        for builder in corpora:
            assert builder.FILE_NAME is not None
            if builder.FILE_NAME.fullmatch(path.name):
                raise UserError(f"{path} is named like a clip of {builder.TITLE}.", remedy)
        try:
            info = soundfile.info(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path} is not a readable WAV file.", remedy) from error
        if info.channels != 1 or info.duration > MAX_SAMPLE_S:
            raise UserError(f"{path} has {info.channels} channels and {info.duration:.0f} seconds.", remedy)
        place = folder / path.relative_to(run)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
