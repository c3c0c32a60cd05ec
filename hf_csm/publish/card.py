"""The model card of an adapter or a merged model: facts from the files beside it, rendered by model_card.md.jinja.

The folder is what will be on the Hub: emotions.json and, where present, config.yaml, metrics.jsonl, loss.png, samples/
and the results of measures (`MEASURES`). The card states what is missing.
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

from hf_csm import __version__
from hf_csm.errors import UserError
from hf_csm.files import read_json, read_yaml, write_text_atomic
from hf_csm.mixture.provenance import CorpusTerms
from hf_csm.models.emotion_control import EmotionControl, read_emotion_control
from hf_csm.publish.licenses import (
    LICENSE_FILE,
    License,
    base_terms,
    license_of,
    license_text,
    meaning,
    slug,
)


if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD_NAME = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
PIPELINE_TAG = "audio-to-audio"
MEASURES = {
    "health": "Health of free-running speech: speech rate, pauses, response times",
    "expressivity": "Expressivity: the requested emotion, by recognizers and in pitch and loudness",
    "listening": "A listening test with people",
    "speed": "Real time on a GPU",
}
"""Possible measures: `<name>.json`, an object of numbers, holds the results of one."""
LOSSES = {
    "loss": "all targets, weighted as in training",
    "text_words": "text: words",
    "text_padding": "text: padding",
    "codebook_0": "codebook 0 (semantic)",
    "codebooks_rest": "the other codebooks",
}
_SETTINGS = (
    ("training", "max_steps", "gradient_accumulation_steps", "max_grad_norm"),
    ("dataset", "duration_sec", "batch_size", "control", "prefix_dropout", "emotions", "languages"),
    ("lora", "rank", "alpha", "dropout", "target_modules"),
    ("optimizer", "name", "lr", "weight_decay", "betas"),
    ("scheduler", "num_warmup_steps", "min_lr_ratio"),
    ("loss", "text_weight", "text_padding_weight", "first_codebook_weight", "other_codebooks_weight"),
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
COPY_AGAIN = "Copy it again from where the run was trained."


@dataclass(frozen=True)
class CardFacts:
    """The content of a card.

    Attributes:
        repo_id: of the model.
        base_model: Hub repository of the base; None for a local folder, whose path is private.
        merged: the repository holds merged weights instead of an adapter.
        corpora: training data; empty if not known.
        options: of the run, as in config.yaml; empty if not known.
        metrics: lines of metrics.jsonl up to the step of the checkpoint.
        measured: results by measure (`MEASURES`).
        samples: paths of clips in the repository.
        has_plot: loss.png is in the repository.
    """

    repo_id: str
    base_model: str | None
    base_revision: str | None
    base_license: str | None
    merged: bool
    control: EmotionControl
    corpora: tuple[CorpusTerms, ...]
    license: License
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
    """Gather the facts of a card from the files in `folder`.

    Args:
        repo_id: `user/name` of the model.
        corpora: training data, with the licenses that the user has given; empty if not known.
        base_model: Hub repository of the base; a local path does not get into the card.
        base_license: on the base model's card; several are joined by commas.
        merged: the folder holds merged weights instead of an adapter.

    Raises:
        UserError: one of the files is damaged.
    """
    folder = Path(folder)
    control = read_emotion_control(folder)
    metrics = read_numbers(folder / "metrics.jsonl")
    config = folder / "config.yaml"
    is_on_hub = base_model is not None and _HUB_ID.fullmatch(base_model) is not None
    return CardFacts(
        repo_id=repo_id,
        base_model=base_model if is_on_hub else None,
        base_revision=base_revision if is_on_hub else None,
        base_license=base_license,
        merged=merged,
        control=control,
        corpora=tuple(corpora),
        license=license_of(corpora, base_license),
        options=read_yaml(config, COPY_AGAIN) if config.is_file() else {},
        metrics=tuple(line for line in metrics if control.step is None or line["step"] <= control.step),
        measured={
            name: read_results(folder / f"{name}.json") for name in MEASURES if (folder / f"{name}.json").is_file()
        },
        samples=tuple(sorted(path.relative_to(folder).as_posix() for path in folder.glob("samples/**/*.wav"))),
        has_plot=(folder / "loss.png").is_file(),
    )


def model_card(facts: CardFacts) -> str:
    """Render the card: the Hub's metadata, and Markdown."""
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["cell"] = _cell
    sources = (*facts.corpora, *base_terms(facts.base_model or "", facts.base_license))
    emotions = facts.control.emotions
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        metadata=card_data(facts).to_yaml(),
        version=__version__,
        # An emotion for the examples: an audible one.
        example="happy" if "happy" in emotions else next((name for name in emotions if name != "neutral"), None),
        meaning=meaning,
        noncommercial=list(dict.fromkeys(terms.title.strip() for terms in sources if "-nc" in terms.license)),
        settings=_settings(facts.options),
        losses=LOSSES,
        measures=MEASURES,
        missing=[title for name, title in MEASURES.items() if not facts.measured.get(name)],
        has_base_samples=any(Path(path).name.startswith("base_") for path in facts.samples),
    )


def write_card(facts: CardFacts, folder: Path) -> list[str]:
    """Write README.md, and LICENSE.md if no license id of the Hub describes the model; return the names written."""
    texts = {CARD_NAME: model_card(facts)}
    if facts.license.link == LICENSE_FILE:
        base = facts.base_model or "the base model"
        texts[LICENSE_FILE] = license_text(facts.corpora, facts.license, base, facts.base_license)
    for name, text in texts.items():
        write_text_atomic(Path(folder) / name, text)
    return list(texts)


def card_data(facts: CardFacts) -> ModelCardData:
    """Return the card's metadata, by which the Hub indexes the model."""
    from huggingface_hub import ModelCardData

    languages = {"en"}.union(*(terms.languages for terms in facts.corpora))  # the base speaks English
    emotions = [emotion.replace(" ", "-") for emotion in facts.control.emotions]
    return ModelCardData(
        language=sorted(languages),
        license=facts.license.id,
        license_name=facts.license.name,
        license_link=facts.license.link,
        library_name="moshi" if facts.merged else "peft",
        pipeline_tag=PIPELINE_TAG,
        base_model=facts.base_model,
        # On the Hub, "merge" means several models; weights with an adapter merged in are a finetune.
        base_model_relation=None if facts.base_model is None else "finetune" if facts.merged else "adapter",
        datasets=sorted({terms.table for terms in facts.corpora if terms.table}) or None,
        tags=["moshi", "speech", "emotion", "full-duplex", *([] if facts.merged else ["lora"]), "hf-csm", *emotions],
        model_name=facts.repo_id.partition("/")[2],
        eval_results=_eval_results(facts) or None,
    )


def _eval_results(facts: CardFacts) -> list[Any]:
    from huggingface_hub import EvalResult

    trained_on = [terms for terms in facts.corpora if not terms.replay]
    tables = {terms.table or slug(terms.corpus) for terms in trained_on}
    titles = ", ".join(dict.fromkeys(terms.title for terms in trained_on)) or "unknown"
    return [
        EvalResult(
            task_type=PIPELINE_TAG,
            task_name="Spoken dialogue",
            dataset_type=tables.copy().pop() if len(tables) == 1 else "mixture",
            dataset_name=f"{' '.join(titles.split())}, validation split",
            dataset_split="validation",
            metric_type="loss",
            metric_name=f"Negative log-likelihood in nats, {name}",
            metric_value=round(facts.evaluation[f"eval_{key}"], 6),
        )
        for key, name in LOSSES.items()
        if f"eval_{key}" in facts.evaluation
    ]


def _settings(options: dict[str, Any]) -> str:
    """Return the main options as YAML; an empty text if there are none."""
    settings = {}
    for group, *names in _SETTINGS:
        values = options.get(group) or {}
        settings[group] = {name: values[name] for name in names if values.get(name) is not None}
    found = {group: values for group, values in settings.items() if values}
    return yaml.safe_dump(found, sort_keys=False) if found else ""


def read_numbers(path: Path) -> list[dict[str, float]]:
    """Return the numbers in each line of a metrics.jsonl; empty if there is none. A truncated last line is dropped.

    Raises:
        UserError: a line is no object with a step.
    """
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise UserError(f"{path} is damaged: no step in {text[:80]!r}.", COPY_AGAIN)
        lines.append({key: value for key, value in line.items() if _is_number(value)})
    return lines


def read_results(path: Path) -> dict[str, float]:
    """Return the numbers in the JSON file of a measure."""
    return {key: value for key, value in read_json(path, COPY_AGAIN).items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _cell(text: str) -> str:
    """Return text that stays in its line and table cell, whatever it contains."""
    return re.sub(r"([|<>`*\[\]])", r"\\\1", " ".join(str(text).split()))
