"""Resolve model names to adapters of one base, or to one whole model, without loading weights."""

from __future__ import annotations

import copy
import difflib
import filecmp
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi.models import loaders

from hf_csm.errors import UserError
from hf_csm.models.emotion_control import EmotionControl, read_emotion_control
from hf_csm.models.family import RuntimeAdapter
from hf_csm.models.moshi.checkpoint import LORA_KEYS, MoshiCheckpoint, find_checkpoint
from hf_csm.models.moshi.pull import find_folder


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
        base: checkpoint of the base or merged model.
        base_name: its repository or folder.
        adapters: adapters for the engine, in the order of the names.
        choices: one per adapter and `base` last, or a single one for a model without adapters.
    """

    base: MoshiCheckpoint
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
    found = [_resolve(name, revision) for name in names]
    adapters = [model for model in found if model.is_adapter]
    plain = [model for model in found if not model.is_adapter]
    first = found[0]
    merged = next((model for model in plain if model.control.emotions), None)
    if adapters and merged is not None:
        raise UserError(
            f"{merged.source} is a merged model and cannot be combined with adapters.", "Name its adapter instead."
        )
    for other in found[1:]:
        _check_same_base(first, other)
    if not adapters:
        if len(plain) > 1:
            raise UserError(
                f"{plain[0].source} and {plain[1].source} are both whole models; only one can be loaded.",
                "Name one of them, or name adapters.",
            )
        given_name = first.given_name or (MERGED if first.control.emotions else BASE)
        return ResolvedModels(first.checkpoint, first.base_name, (), (AdapterChoice(given_name, None, first.control),))
    choices = [AdapterChoice(model.name, index, model.control) for index, model in enumerate(adapters)]
    choices.append(AdapterChoice(BASE, None, EmotionControl()))
    _check_names(choices)
    base = copy.copy(adapters[0].checkpoint)
    base.lora_weights, base.name_or_path, base.revision = None, adapters[0].base_name, None
    base.lm_config, base.raw_config = _without_lora(base.lm_config), _without_lora(base.raw_config)
    return ResolvedModels(base, adapters[0].base_name, tuple(map(_adapter, adapters)), tuple(choices))


@dataclass(frozen=True)
class _Model:
    """A model given by the user as `given_name=source` or `source`."""

    given_name: str | None
    source: str
    folder: Path
    checkpoint: MoshiCheckpoint
    control: EmotionControl

    @property
    def is_adapter(self) -> bool:
        return self.checkpoint.lora_weights is not None

    @property
    def name(self) -> str:
        return self.given_name or _name_of(self.source)

    @property
    def origin(self) -> str:
        return f"is an adapter of {self.base_name}" if self.is_adapter else "is a whole model"

    @property
    def base_name(self) -> str:
        """Repository or folder of the base weights."""
        name = str((self.checkpoint.raw_config or {}).get("moshi_name", ""))
        if self.is_adapter and name.startswith("hf://"):
            return "/".join(name.removeprefix("hf://").split("/")[:2])
        return str(self.checkpoint.moshi_weights.parent) if self.is_adapter else self.source


def _resolve(name: str, revision: str | None) -> _Model:
    given_name, equals, source = name.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", given_name) or Path(name).is_dir():
        given_name, source = "", name
    folder = find_folder(source, revision)
    checkpoint = find_checkpoint(source, revision)
    return _Model(given_name or None, source, folder, checkpoint, read_emotion_control(folder))


def _name_of(source: str) -> str:
    """Return the default name of an adapter: the last descriptive part of its path.

    >>> _name_of("user/moshi-happy"), _name_of("checkpoints/happy/checkpoint_000500/consolidated")
    ('moshi-happy', 'happy')
    """
    parts = Path(source).expanduser().absolute().parts
    descriptive = [part for part in parts if not re.fullmatch(r"checkpoint_\d+|best|consolidated|adapter", part)]
    return (descriptive or parts)[-1]


def _adapter(model: _Model) -> RuntimeAdapter:
    config = model.checkpoint.raw_config or {}
    assert model.checkpoint.lora_weights is not None
    try:
        rank, scaling = int(config["lora_rank"]), float(config["lora_scaling"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.source}: config.json lacks lora_rank or lora_scaling.", "Export the adapter again."
        ) from error
    return RuntimeAdapter(model.name, model.checkpoint.lora_weights, rank, scaling)


def _check_names(choices: Sequence[AdapterChoice]) -> None:
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two adapters have the name {name!r}.", "Rename one of them: NAME=REPO_OR_FOLDER.")


def _check_same_base(first: _Model, other: _Model) -> None:
    # The first Moshi repositories have no config.json; their adapters do.
    configs = [_without_lora(model.checkpoint.lm_config or loaders._lm_kwargs) for model in (first, other)]
    if configs[0] != configs[1] or not _same_content(first.checkpoint.moshi_weights, other.checkpoint.moshi_weights):
        raise UserError(
            f"{first.source} {first.origin}, and {other.source} {other.origin}: the base models differ.",
            "Name adapters of the same base model.",
        )


def _same_content(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or filecmp.cmp(one, other, shallow=False)


def _without_lora(config: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if config is None else {key: value for key, value in config.items() if key not in LORA_KEYS}


def _suggestion(name: str, names: Sequence[str]) -> str:
    return "".join(f"; nearest is {near!r}" for near in difflib.get_close_matches(name, names, n=1))
