"""What a run leaves besides weights, as others may see it: options without local paths, metrics, samples."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import yaml

from hf_csm.corpora import all_builders
from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CORPORA_NAME, CorpusTerms, write_corpora
from hf_csm.publish.card import MEASURES
from hf_csm.training.metrics_log import read_metrics
from hf_csm.training.plots import plot_losses


CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"
SAMPLES_NAME = "samples"
MEASURED_NAMES = tuple(f"{name}.json" for name in MEASURES)
RUN_FILES = (CONFIG_NAME, METRICS_NAME, PLOT_NAME, CORPORA_NAME, *MEASURED_NAMES)
"""Besides the folder of samples."""
MAX_SAMPLE_S = 300.0
"""A sample is a minute or two, not a recording of an evening."""


def run_folder(checkpoint: Path) -> Path:
    """Return where the files of a run are: the run's folder for a training checkpoint, else the export itself."""
    checkpoint = Path(checkpoint).resolve()
    return checkpoint.parent if (checkpoint / "adapter").is_dir() else checkpoint


def copy_run_files(
    checkpoint: Path, folder: Path, *, corpora: Sequence[CorpusTerms], base_model: str | None = None
) -> None:
    """Copy to `folder` what there is of `RUN_FILES`, and the samples, for a training checkpoint or an export.

    Args:
        corpora: that it was trained on.
        base_model: repository of the base model, for the configuration; by default the one that says.

    Raises:
        UserError: a file is damaged.
    """
    run = run_folder(checkpoint)
    if corpora:
        write_corpora(corpora, folder)
    if (run / CONFIG_NAME).is_file():
        config = public_config(_read_mapping(run / CONFIG_NAME), corpora, base_model)
        (folder / CONFIG_NAME).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    if (run / METRICS_NAME).is_file():
        lines = public_metrics(run / METRICS_NAME)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / METRICS_NAME).write_text(text, encoding="utf-8")
        if any("loss" in line or "eval_loss" in line for line in lines):
            plot_losses(lines, folder / PLOT_NAME, "Loss")
    for name in MEASURED_NAMES:
        if (checkpoint / name).is_file():
            results = _read_mapping(checkpoint / name)
            numbers = {key: value for key, value in results.items() if _is_number(value)}
            (folder / name).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    _copy_samples(run, folder)


def public_config(
    config: dict[str, Any], corpora: Sequence[CorpusTerms], base_model: str | None = None
) -> dict[str, Any]:
    """Return a run's options with the last part only of every local path; what is on the Hub keeps its name.

    Args:
        corpora: that the run was trained on: they tell tables on the Hub from folders.
    """
    on_hub = {terms.table for terms in corpora} | {base_model}
    public: dict[str, Any] = json.loads(json.dumps(config))  # a copy

    def shorten(options: dict[str, Any] | None, *names: str) -> None:
        for name in names:
            if options and isinstance(options.get(name), str) and options[name] not in on_hub:
                options[name] = Path(options[name]).name

    def walk(node: Any) -> Any:  # what a hand has added
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if isinstance(node, list):
            return [walk(value) for value in node]
        is_path = isinstance(node, str) and (node.startswith(("/", "~", "./", "../", "file:")) or "\\" in node)
        return Path(node).name if is_path else node

    dataset = public.get("dataset") or {}
    shorten(public, "run_dir", "resume_from_checkpoint")
    shorten(dataset, "manifest_path", "val_manifest_path")
    shorten(dataset.get("replay"), "manifest_path")
    for source in dataset.get("sources") or []:
        shorten(source, "path")
    if base_model is not None:
        public.setdefault("moshi_paths", {})["hf_repo_id"] = base_model
    return walk(public)


def public_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl, numbers only; a last line that was cut short is left out."""
    return [{key: value for key, value in line.items() if _is_number(value)} for line in read_metrics(path)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _read_mapping(path: Path) -> dict[str, Any]:
    """Return what a YAML or JSON file holds."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "it holds no options"
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
    raise UserError(f"{path} is damaged: {reason}.", "Copy it again from where the run was trained.")


def _copy_samples(run: Path, folder: Path) -> None:
    """Copy the clips of `samples/`: what a model says is no corpus's, and nothing else may go with it.

    Raises:
        UserError: one of them is a clip of a corpus, or has a second channel, where its listener may be one.
    """
    remedy = f"Keep only what the model says in {run / SAMPLES_NAME}, one channel each, as generate_samples.py writes."
    corpora = [builder for builder in all_builders() if builder.FILE_NAME is not None]
    for path in sorted((run / SAMPLES_NAME).rglob("*.wav")):
        for builder in corpora:
            assert builder.FILE_NAME is not None
            if builder.FILE_NAME.fullmatch(path.name):
                raise UserError(f"{path} has the name of a clip of {builder.TITLE}.", remedy)
        try:
            info = soundfile.info(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path} is not a WAV file that can be read.", remedy) from error
        if info.channels != 1 or info.duration > MAX_SAMPLE_S:
            raise UserError(f"{path} has {info.channels} channels and {info.duration:.0f} seconds.", remedy)
        place = folder / path.relative_to(run)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
