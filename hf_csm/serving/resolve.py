"""Resolve model names to adapters of one base, or to one whole model, without loading weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_csm.errors import UserError
from hf_csm.hub import find_model
from hf_csm.models import get_family
from hf_csm.models.emotion_control import EmotionControl, read_emotion_control
from hf_csm.models.family import Checkpoint, Family, RuntimeAdapter


BASE = "base"
"""Name of the choice without an adapter."""
MERGED = "merged"


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that a client can choose, or the model without an adapter.

    Attributes:
        name: name of the adapter, `base` or `merged`.
        index: index among the engine's adapters; None for the model without an adapter.
        control: how the emotion is controlled.
    """

    name: str
    index: int | None
    control: EmotionControl

    @property
    def emotions(self) -> tuple[str, ...]:
        """Emotions that can be selected; without a prefix, only the emotion of an adapter trained on a single one."""
        is_selectable = self.control.control == "prefix" or len(self.control.emotions) == 1
        return self.control.emotions if is_selectable else ()


@dataclass(frozen=True)
class ResolvedModels:
    """Resolved models: everything but the weights.

    Attributes:
        family: of the base.
        base: checkpoint of the base or merged model.
        base_name: its repository or folder.
        adapters: adapters for the engine, in the order of the names.
        choices: one per adapter and `base` last, or a single one for a model without adapters.
    """

    family: Family
    base: Checkpoint
    base_name: str
    adapters: tuple[RuntimeAdapter, ...]
    choices: tuple[AdapterChoice, ...]

    @property
    def emotions(self) -> list[str]:
        """Emotions that at least one choice supports, in the order of the choices."""
        return list(dict.fromkeys(emotion for choice in self.choices for emotion in choice.emotions))

    def choose(self, emotion: str | None, adapter: str | None = None) -> AdapterChoice:
        """Return the choice with this name, or the first one that supports the emotion.

        If there are adapters, `base` accepts and ignores any emotion, for comparison.

        Raises:
            UserError: the name or the emotion is not available.
        """
        named = [choice for choice in self.choices if adapter in (None, choice.name)]
        if not named:
            names = [choice.name for choice in self.choices]
            raise UserError(
                f"There is no adapter {adapter!r}{_suggestion(str(adapter), names)}.", f"Choose {', '.join(names)}."
            )
        is_comparison = adapter == BASE and len(self.choices) > 1
        if emotion is None or is_comparison:
            return named[0]
        for choice in named:
            if emotion in choice.emotions:
                return choice
        supported = list(dict.fromkeys(name for choice in named for name in choice.emotions))
        model = f"{self.base_name} with {len(self.adapters)} adapters" if self.adapters else self.base_name
        subject = model if adapter is None else f"The adapter {adapter!r}"
        if not supported:
            raise UserError(
                f"{subject} does not support emotions; {emotion!r} was requested.",
                "Name an adapter that was trained on emotions, or omit the emotion.",
            )
        raise UserError(
            f"{subject} does not support the emotion {emotion!r}{_suggestion(emotion, supported)}.",
            f"Supported emotions: {', '.join(supported)}.",
        )


def resolve_models(names: Sequence[str], revision: str | None = None) -> ResolvedModels:
    """Resolve adapters of one base, or a base or merged model, and read their metadata.

    Args:
        names: Hub repositories, exported folders or training checkpoints, optionally as `NAME=REPO_OR_FOLDER`. The
            base of the adapters may be among them.
        revision: branch, tag or commit; only with a single name.

    Raises:
        UserError: a model is missing or damaged, two have the same name, or they have different bases.
    """
    if not names:
        raise UserError("No model was given.", "Name an adapter: a Hub repository or a folder.")
    if revision is not None and len(names) > 1:
        raise UserError(f"--revision {revision} is ambiguous with {len(names)} models.", "Use it with a single model.")
    models = [_resolve(name, revision) for name in names]
    adapters = [model for model in models if model.adapter is not None]
    whole = [model for model in models if model.adapter is None]
    first = models[0]
    merged = next((model for model in whole if model.control.emotions), None)
    if adapters and merged is not None:
        raise UserError(
            f"{merged.source} is a merged model and cannot be combined with adapters.", "Name its adapter instead."
        )
    for other in models[1:]:
        if not first.family.is_same_base(first.checkpoint, other.checkpoint):
            raise UserError(
                f"{first.source} {first.origin}, and {other.source} {other.origin}: the base models differ.",
                "Name adapters of the same base model.",
            )
    if not adapters:
        if len(whole) > 1:
            raise UserError(
                f"{whole[0].source} and {whole[1].source} are both whole models; only one can be loaded.",
                "Name one of them, or name adapters.",
            )
        name = first.given_name or (MERGED if first.control.emotions else BASE)
        return ResolvedModels(
            first.family, first.base, first.base_name, (), (AdapterChoice(name, None, first.control),)
        )
    choices = [AdapterChoice(model.name, index, model.control) for index, model in enumerate(adapters)]
    choices.append(AdapterChoice(BASE, None, EmotionControl()))
    _check_names(choices)
    base = adapters[0]
    runtime = tuple(model.adapter for model in adapters if model.adapter is not None)
    return ResolvedModels(base.family, base.base, base.base_name, runtime, tuple(choices))


@dataclass(frozen=True)
class _Model:
    """A model given by the user as `given_name=source` or `source`.

    Attributes:
        base: checkpoint of the base weights; the checkpoint itself for a whole model.
        adapter: None for a whole model.
    """

    given_name: str | None
    source: str
    family: Family
    checkpoint: Checkpoint
    base: Checkpoint
    adapter: RuntimeAdapter | None
    control: EmotionControl

    @property
    def name(self) -> str:
        return self.given_name or _name_of(self.source)

    @property
    def origin(self) -> str:
        return "is a whole model" if self.adapter is None else f"is an adapter of {self.base_name}"

    @property
    def base_name(self) -> str:
        return self.source if self.adapter is None else self.base.name_or_path


def _resolve(name: str, revision: str | None) -> _Model:
    given_name, equals, source = name.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", given_name) or Path(name).is_dir():
        given_name, source = "", name
    family = get_family(source, revision)
    checkpoint = family.find_checkpoint(source, revision)
    base, adapter = family.split_adapter(checkpoint, given_name or _name_of(source))
    control = read_emotion_control(find_model(source, revision))
    return _Model(given_name or None, source, family, checkpoint, base, adapter, control)


def _name_of(source: str) -> str:
    """Return the default name of an adapter: the last descriptive part of its path.

    >>> _name_of("user/moshi-happy"), _name_of("checkpoints/happy/checkpoint_000500/consolidated")
    ('moshi-happy', 'happy')
    """
    parts = Path(source).expanduser().absolute().parts
    descriptive = [part for part in parts if not re.fullmatch(r"checkpoint_\d+|best|consolidated|adapter", part)]
    return (descriptive or parts)[-1]


def _check_names(choices: Sequence[AdapterChoice]) -> None:
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two adapters have the name {name!r}.", "Rename one of them: NAME=REPO_OR_FOLDER.")


def _suggestion(name: str, names: Sequence[str]) -> str:
    return "".join(f"; nearest is {near!r}" for near in difflib.get_close_matches(name, names, n=1))
