"""Which emotions an adapter knows and how to ask it for one: `emotions.json`, beside config.json.

It is a file of its own because moshi's loader takes every key of config.json for an argument of the model.
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
from hf_csm.mixture.provenance import CORPORA_NAME, read_corpora
from hf_csm.models.moshi.pull import EMOTIONS_NAME


RUN_CONFIG_NAME = "config.yaml"
CONTROLS = ("prefix", "none")
NOT_TO_BE_ASKED_FOR = ("other", UNLABELLED)
"""Labels of windows that name no emotion."""
_NAME = re.compile(r"[\w-][\w -]{0,38}[\w-]|[\w-]")


class Tokenizer(Protocol):
    """What turns text into token ids, such as a SentencePiece model."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class EmotionControl:
    """How to ask a model for an emotion.

    Attributes:
        control: `prefix` names the emotion in the first frames of the text stream, `none` cannot be asked.
        prefix_template: text of the prefix, with `{emotion}`.
        emotions: that were trained; without prefix the one that the model always speaks with, if it is one.
        base_model: repository or folder that was adapted.
        base_revision: of that repository, if the run named one.
        step: of the checkpoint.
    """

    control: str = "none"
    prefix_template: str = DatasetConfig.prefix_template
    emotions: tuple[str, ...] = ()
    base_model: str | None = None
    base_revision: str | None = None
    step: int | None = None

    def tokens(self, emotion: str | None, tokenizer: Tokenizer) -> list[int]:
        """Return the text tokens that ask for an emotion; none where there is nothing to ask."""
        if self.control == "none" or emotion is None:
            return []
        return list(tokenizer.encode(self.prefix_template.format(emotion=emotion)))


def read_emotion_control(folder: Path) -> EmotionControl:
    """Return what an export says in `emotions.json`, or for a training checkpoint what its run was configured to.

    A model that says nothing, such as a base model, has control `none` and no emotions.

    Raises:
        UserError: the file that says it is damaged.
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
    """Write `emotions.json`, whole or not at all."""
    part = Path(folder) / f".{EMOTIONS_NAME}.tmp"
    part.write_text(json.dumps(asdict(control), indent=2) + "\n", encoding="utf-8")
    part.replace(Path(folder) / EMOTIONS_NAME)


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
            f"{path} is damaged: {' '.join(str(error).split())[:200]}", "Copy it again from where the run was trained."
        ) from error
    trained = set(filtered or ())
    if (run_dir / CORPORA_NAME).is_file():  # runs of before did not write it
        trained = {emotion for corpus in read_corpora(run_dir) for emotion in corpus.emotions}
    emotions = tuple(name for name in EMOTIONS if name in trained and name not in NOT_TO_BE_ASKED_FOR)
    if control == "none" and len(trained) != 1:  # several emotions, and nothing chooses among them
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
            "Export or pull it again; without that file the model still speaks, but takes no emotion.",
        )
    known = {field.name for field in fields(EmotionControl)}
    told = {key: value for key, value in record.items() if key in known}
    return EmotionControl(**told | {"emotions": tuple(record["emotions"])})


def _problem(record: Any) -> str | None:
    """Say what is wrong with the content of an `emotions.json`, which may come from anybody."""
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
    # Of attributes, widths and conversions, which `format` knows, none has a place in a prefix.
    if {part[1:] for part in parts if part[1] is not None} != {("emotion", "", None)}:
        return f"prefix_template is {record.get('prefix_template')!r}, not a text with {{emotion}} in it"
    for name, kind in (("base_model", str), ("base_revision", str), ("step", int)):
        if record.get(name) is not None and not isinstance(record[name], kind):
            return f"{name} is {record[name]!r}"
    return None
