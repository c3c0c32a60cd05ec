"""The model card of an adapter, or of a model merged with it. What it says is read from what lies beside it.

    corpora = with_stated(read_corpora(folder), stated)                  # licences.py
    check_licences(corpora, repo_id, private=private, cleared=cleared)   # licences.py
    write_card(facts_of(folder, repo_id, corpora, base_model=..., merged=...), folder)

The folder is what will be on the Hub: emotions.json, and as far as they are there config.yaml, metrics.jsonl,
loss.png, samples/ and the results of measures (`MEASURES`). What is not there is said to be missing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hf_csm.errors import UserError
from hf_csm.mixture.provenance import CorpusTerms
from hf_csm.models.emotion_control import EmotionControl, read_emotion_control
from hf_csm.publish.card_text import LOSSES, MEASURES, body
from hf_csm.publish.licenses import LICENCE_FILE, Licence, licence_of, licence_text, slug


if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD_NAME = "README.md"
PIPELINE_TAG = "audio-to-audio"
"""The Hub's task for speech in, speech out."""
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        repo_id: of the model that the card is of.
        base_model: repository of the base; anything else is not named, since it is a place on somebody's machine.
        merged: whether the repository holds whole weights instead of an adapter.
        corpora: that were trained on; empty if that is not known.
        options: of the run, as in config.yaml; empty if they are not known.
        metrics: lines of metrics.jsonl up to the step of the checkpoint.
        measured: results by the names of `MEASURES`, as far as there are some.
        samples: paths of clips in the repository.
        has_plot: whether the curve of the loss is in the repository.
    """

    repo_id: str
    base_model: str | None
    base_revision: str | None
    base_license: str | None
    merged: bool
    control: EmotionControl
    corpora: tuple[CorpusTerms, ...]
    licence: Licence
    options: dict[str, Any] = field(default_factory=dict)
    metrics: tuple[dict[str, float], ...] = ()
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    samples: tuple[str, ...] = ()
    has_plot: bool = False

    @property
    def evaluation(self) -> dict[str, float]:
        """The last evaluation up to the checkpoint; empty if there was none."""
        return next((line for line in reversed(self.metrics) if "eval_loss" in line), {})


def facts_of(
    folder: Path,
    repo_id: str,
    corpora: Sequence[CorpusTerms],
    *,
    base_model: str | None,
    base_revision: str | None = None,
    base_license: str | None = None,
    merged: bool = False,
) -> CardFacts:
    """Read from a folder what a card of it says.

    Args:
        repo_id: `user/name` that it will have.
        corpora: that were trained on, with the licences that the user has stated; none if they are not known.
        base_model: repository of the base; the card names nothing else, since that would be a place on a machine.
        base_license: that the card of the base model states, several with commas between.
        merged: whether whole weights are in the folder instead of an adapter.

    Raises:
        UserError: one of the files is damaged.
    """
    folder = Path(folder)
    control = read_emotion_control(folder)
    metrics = _read_metrics(folder / "metrics.jsonl", control.step)
    is_on_hub = base_model is not None and _HUB_ID.fullmatch(base_model) is not None
    return CardFacts(
        repo_id=repo_id,
        base_model=base_model if is_on_hub else None,
        base_revision=base_revision if is_on_hub else None,
        base_license=base_license,
        merged=merged,
        control=control,
        corpora=tuple(corpora),
        licence=licence_of(corpora, base_license),
        options=_read_options(folder / "config.yaml"),
        metrics=metrics,
        measured={
            name: _read_results(folder / f"{name}.json") for name in MEASURES if (folder / f"{name}.json").is_file()
        },
        samples=tuple(sorted(path.relative_to(folder).as_posix() for path in folder.glob("samples/**/*.wav"))),
        has_plot=(folder / "loss.png").is_file(),
    )


def model_card(facts: CardFacts) -> str:
    """Return the card: metadata as the Hub knows them, and Markdown."""
    return f"---\n{card_data(facts).to_yaml()}\n---\n\n{body(facts)}"


def write_card(facts: CardFacts, folder: Path) -> list[str]:
    """Write README.md, and LICENSE.md if no licence of the Hub describes the model; return the names written."""
    texts = {CARD_NAME: model_card(facts)}
    if facts.licence.link == LICENCE_FILE:
        base = facts.base_model or "the base model"
        texts[LICENCE_FILE] = licence_text(facts.corpora, facts.licence, base, facts.base_license)
    for name, text in texts.items():
        part = Path(folder) / f".{name}.tmp"
        part.write_text(text, encoding="utf-8")
        part.replace(Path(folder) / name)
    return list(texts)


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the metadata: what the Hub finds the model by, and shows beside it."""
    from huggingface_hub import ModelCardData

    languages = {"en"}.union(*(terms.languages for terms in facts.corpora))  # the base speaks English
    emotions = [emotion.replace(" ", "-") for emotion in facts.control.emotions]
    results = _eval_results(facts)
    return ModelCardData(
        language=sorted(languages),
        license=facts.licence.id,
        license_name=facts.licence.name,
        license_link=facts.licence.link,
        library_name="moshi" if facts.merged else "peft",
        pipeline_tag=PIPELINE_TAG,
        base_model=facts.base_model,
        # A merge, on the Hub, is of several models; weights with their adapter in them are a finetune.
        base_model_relation=None if facts.base_model is None else "finetune" if facts.merged else "adapter",
        datasets=sorted({terms.table for terms in facts.corpora if terms.table}) or None,
        tags=["moshi", "speech", "emotion", "full-duplex", *([] if facts.merged else ["lora"]), "hf-csm", *emotions],
        model_name=facts.repo_id.partition("/")[2],
        eval_results=results or None,
    )


def _eval_results(facts: CardFacts) -> list[Any]:
    from huggingface_hub import EvalResult

    if not facts.evaluation:
        return []
    tables = {terms.table or slug(terms.corpus) for terms in facts.corpora if not terms.replay}
    table = tables.pop() if len(tables) == 1 else "mixture"
    titles = ", ".join(dict.fromkeys(terms.title for terms in facts.corpora if not terms.replay)) or "unknown"
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name="Spoken dialogue",
            dataset_type=table,
            dataset_name=f"{' '.join(titles.split())}, validation split",
            dataset_split="validation",
            metric_type="loss",
            metric_name=f"Negative log likelihood in nats, {name}",
            metric_value=round(facts.evaluation[f"eval_{key}"], 6),
        )
        for key, name in LOSSES.items()
        if f"eval_{key}" in facts.evaluation
    ]


def _read_options(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    if not isinstance(options, dict):
        raise _damaged(path, TypeError("no options"))
    return options


def _read_metrics(path: Path, step: int | None) -> tuple[dict[str, float], ...]:
    """Return the lines up to `step`; a last one that was cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise _damaged(path, TypeError(f"a line is {text[:80]}"))
        if step is None or line["step"] <= step:
            lines.append({key: value for key, value in line.items() if _is_number(value)})
    return tuple(lines)


def _read_results(path: Path) -> dict[str, float]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(results, dict):
        raise _damaged(path, TypeError("not a JSON object"))
    return {str(key): value for key, value in results.items() if isinstance(value, bool) or _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged: {' '.join(str(error).split())[:200]}.", "Copy it again from where the run was trained."
    )
