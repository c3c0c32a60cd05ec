"""Emotions that a model was trained on and how to request one: `emotions.json`, beside config.json.

It is a separate file because moshi's loader passes every key of config.json to the model.
"""

from __future__ import annotations

import json
import re
import string
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import yaml

from hf_csm.config import DatasetConfig
from hf_csm.data.labels import EMOTIONS, UNLABELLED
from hf_csm.errors import UserError
from hf_csm.files import write_text_atomic
from hf_csm.hub import EMOTIONS_NAME
from hf_csm.mixture.provenance import read_corpora


RUN_CONFIG_NAME = "config.yaml"
CONTROLS = ("prefix", "none")
NO_EMOTIONS = ("other", UNLABELLED)
"""Labels that name no emotion."""
_NAME = re.compile(r"[\w-][\w -]{0,38}[\w-]|[\w-]")


class Tokenizer(Protocol):
    """Text to token ids, such as a SentencePiece model."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class EmotionControl:
    """How to request an emotion from a model.

    Attributes:
        control: with `prefix`, the first frames of the text stream name the emotion; with `none`, nothing does.
        prefix_template: text of the prefix, with `{emotion}`.
        emotions: that the model was trained on; without a prefix, at most the one that it always speaks with.
        base_model: repository or folder of the base model.
        base_revision: of that repository, if the run named one.
        step: of the checkpoint.
        merged_sha256: of a merged model as it was verified; see `publish.export.hash_merged`.
    """

    control: str = "none"
    prefix_template: str = DatasetConfig.prefix_template
    emotions: tuple[str, ...] = ()
    base_model: str | None = None
    base_revision: str | None = None
    step: int | None = None
    merged_sha256: str | None = None

    def tokens(self, emotion: str | None, tokenizer: Tokenizer) -> list[int]:
        """Return the text tokens of the prefix; none without an emotion or a prefix."""
        if self.control == "none" or emotion is None:
            return []
        return list(tokenizer.encode(self.prefix_template.format(emotion=emotion)))


def read_emotion_control(folder: Path) -> EmotionControl:
    """Return the content of an export's `emotions.json`, or for a training checkpoint the options of its run.

    A folder with neither, such as a base model, has control `none` and no emotions.

    Raises:
        UserError: `emotions.json` or the run's options are damaged.
    """
    folder = Path(folder)
    path = folder / EMOTIONS_NAME
    if path.is_file():
        return _parse(path)
    checkpoint = folder.resolve()
    if checkpoint.name in ("adapter", "consolidated"):
        checkpoint = checkpoint.parent
    is_checkpoint = (checkpoint / "adapter").is_dir() or (checkpoint / "consolidated").is_dir()
    if is_checkpoint and (checkpoint.parent / RUN_CONFIG_NAME).is_file():
        return _of_run(checkpoint)
    return EmotionControl()


def write_emotion_control(control: EmotionControl, folder: Path) -> None:
    """Write `emotions.json`, complete or not at all."""
    record = asdict(control)
    if control.merged_sha256 is None:
        del record["merged_sha256"]
    write_text_atomic(Path(folder) / EMOTIONS_NAME, json.dumps(record, indent=2) + "\n")


def _of_run(checkpoint: Path) -> EmotionControl:
    run_dir = checkpoint.parent
    path = run_dir / RUN_CONFIG_NAME
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        dataset, paths = config["dataset"], config["moshi_paths"]
        control, filtered = dataset["control"], dataset["emotions"]
        template, base, revision = dataset["prefix_template"], paths["hf_repo_id"], paths["revision"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: {' '.join(str(error).split())[:200]}", "Copy it again from the machine of the run."
        ) from error
    trained = set(filtered or ())
    if corpora := read_corpora(run_dir):
        trained = {emotion for corpus in corpora for emotion in corpus.emotions}
    emotions = tuple(name for name in EMOTIONS if name in trained and name not in NO_EMOTIONS)
    if control == "none" and len(trained) != 1:  # several emotions, and nothing selects one
        emotions = ()
    step = checkpoint.name.rpartition("_")[2]
    return EmotionControl(control, template, emotions, base, revision, int(step) if step.isdigit() else None)


def _parse(path: Path) -> EmotionControl:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem(record)
    except ValueError as error:
        problem = f"it is not JSON ({' '.join(str(error).split())[:200]})"
    if problem:
        raise UserError(
            f"{path} is damaged: {problem}.",
            "Export or download it again; without that file the model loads, but without emotions.",
        )
    known = {field.name for field in fields(EmotionControl)}
    given = {key: value for key, value in record.items() if key in known}
    return EmotionControl(**given | {"emotions": tuple(record["emotions"])})


def _problem(record: Any) -> str | None:
    """Return what is wrong with the content of an `emotions.json`, which may be from an unknown author."""
    if not isinstance(record, dict):
        return "it is not a JSON object"
    if record.get("control") not in CONTROLS:
        return f"control is {record.get('control')!r}, not one of {', '.join(CONTROLS)}"
    emotions = record.get("emotions")
    if not isinstance(emotions, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in emotions):
        return "emotions is not a list of names"
    try:
        parts = list(string.Formatter().parse(record.get("prefix_template", DatasetConfig.prefix_template)))
    except (ValueError, TypeError):
        parts = []
    # `str.format` also evaluates attributes, widths and conversions, which are refused.
    if {part[1:] for part in parts if part[1] is not None} != {("emotion", "", None)}:
        return f"prefix_template is {record.get('prefix_template')!r}, not a text with {{emotion}} in it"
    for name, kind in (("base_model", str), ("base_revision", str), ("step", int), ("merged_sha256", str)):
        if record.get(name) is not None and not isinstance(record[name], kind):
            return f"{name} is {record[name]!r}"
    return None
