"""The models that a user names, adapters of one base or a whole model, as far as it can be told without weights."""

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
"""Name of the voice without any adapter."""
MERGED = "merged"


@dataclass(frozen=True)
class Voice:
    """A way to speak: an adapter, or the model as it is.

    Attributes:
        name: the adapter's, `base` or `merged`.
        adapter: its number among the engine's adapters; None for the model as it is.
        control: how it is told the emotion.
    """

    name: str
    adapter: int | None
    control: EmotionControl

    @property
    def emotions(self) -> tuple[str, ...]:
        """Emotions that can be asked of it: of an adapter that is not told, only the one it was trained for."""
        is_told = self.control.control == "prefix" or len(self.control.emotions) == 1
        return self.control.emotions if is_told else ()


@dataclass(frozen=True)
class Models:
    """What was found under the names given: all but the weights is read, so that it is known what can be asked for.

    Attributes:
        base: checkpoint of the base or merged model.
        base_name: what to call it: its repository or folder.
        adapters: of the engine, in the order of the names.
        voices: one for each adapter, and `base` last; or the only one of a model without adapters.
    """

    base: MoshiCheckpoint
    base_name: str
    adapters: tuple[RuntimeAdapter, ...]
    voices: tuple[Voice, ...]

    @property
    def emotions(self) -> list[str]:
        """Every emotion that some voice knows, in the order of the voices."""
        return list(dict.fromkeys(emotion for voice in self.voices for emotion in voice.emotions))

    def choose(self, emotion: str | None, voice: str | None = None) -> Voice:
        """Return the voice for an emotion: the one named, else the first that knows it; None is the first of all.

        Beside adapters, `base` takes any emotion and speaks without: it is what they are compared with.

        Raises:
            UserError: no voice has the name, or none of them, or not the one named, knows the emotion.
        """
        named = [found for found in self.voices if voice in (None, found.name)]
        if not named:
            names = [found.name for found in self.voices]
            raise UserError(
                f"There is no voice {voice!r}{_nearest(str(voice), names)}.", f"The voices are {', '.join(names)}."
            )
        is_comparison = voice == BASE and len(self.voices) > 1
        if emotion is None or is_comparison:
            return named[0]
        for found in named:
            if emotion in found.emotions:
                return found
        known = list(dict.fromkeys(known for found in named for known in found.emotions))
        what = f"{self.base_name} with {len(self.adapters)} adapters" if self.adapters else self.base_name
        who = what if voice is None else f"The voice {voice!r}"
        if not known:
            raise UserError(
                f"{who} was not trained to speak with emotions, so not with {emotion!r} either.",
                "Name an adapter that was, or leave the emotion out.",
            )
        raise UserError(
            f"{who} does not know the emotion {emotion!r}{_nearest(emotion, known)}.",
            f"The emotions are {', '.join(known)}.",
        )


def find_models(names: Sequence[str], revision: str | None = None) -> Models:
    """Find adapters of one base, or a base or merged model, and read what they say of themselves.

    Args:
        names: Hub repositories, exported folders or training checkpoints, each perhaps with a name of its own:
            `NAME=REPO_OR_FOLDER`. The base of the adapters may be among them.
        revision: branch, tag or commit of the only name.

    Raises:
        UserError: something is missing or damaged, two have one name, or two are not of one base.
    """
    if not names:
        raise UserError("No model is named.", "Name an adapter: a Hub repository or a folder.")
    if revision is not None and len(names) > 1:
        raise UserError(
            f"--revision {revision} does not say which of {len(names)} models is meant.", "Give it with one model."
        )
    found = [_find(name, revision) for name in names]
    adapters = [model for model in found if model.is_adapter]
    plain = [model for model in found if not model.is_adapter]
    first = found[0]
    merged = next((model for model in plain if model.control.emotions), None)
    if adapters and merged is not None:
        raise UserError(
            f"{merged.place} is a merged model, on which no adapter can be put.", "Name its adapter instead of it."
        )
    for other in found[1:]:
        _check_same_base(first, other)
    if not adapters:
        if len(plain) > 1:
            raise UserError(
                f"{plain[0].place} and {plain[1].place} are whole models, of which one can be loaded.",
                "Name one of them, or adapters.",
            )
        own_name = first.own_name or (MERGED if first.control.emotions else BASE)
        return Models(first.checkpoint, first.base_name, (), (Voice(own_name, None, first.control),))
    voices = [Voice(model.name, number, model.control) for number, model in enumerate(adapters)]
    voices.append(Voice(BASE, None, EmotionControl()))
    _check_names(voices)
    base = copy.copy(adapters[0].checkpoint)
    base.lora_weights, base.name_or_path, base.revision = None, adapters[0].base_name, None
    base.lm_config, base.raw_config = _without_lora(base.lm_config), _without_lora(base.raw_config)
    return Models(base, adapters[0].base_name, tuple(map(_adapter, adapters)), tuple(voices))


@dataclass(frozen=True)
class _Found:
    """A model that was named. `own_name` is the NAME of `NAME=`, `place` what follows it."""

    own_name: str | None
    place: str
    folder: Path
    checkpoint: MoshiCheckpoint
    control: EmotionControl

    @property
    def is_adapter(self) -> bool:
        return self.checkpoint.lora_weights is not None

    @property
    def name(self) -> str:
        return self.own_name or _name_of(self.place)

    @property
    def origin(self) -> str:
        return f"is an adapter of {self.base_name}" if self.is_adapter else "is a whole model"

    @property
    def base_name(self) -> str:
        """Where the weights are that an adapter was trained on; the place itself for a base."""
        name = str((self.checkpoint.raw_config or {}).get("moshi_name", ""))
        if self.is_adapter and name.startswith("hf://"):
            return "/".join(name.removeprefix("hf://").split("/")[:2])
        return str(self.checkpoint.moshi_weights.parent) if self.is_adapter else self.place


def _find(name: str, revision: str | None) -> _Found:
    own_name, equals, place = name.partition("=")
    if not equals or not re.fullmatch(r"[\w.-]+", own_name) or Path(name).is_dir():
        own_name, place = "", name
    folder = find_folder(place, revision)
    checkpoint = find_checkpoint(place, revision)
    return _Found(own_name or None, place, folder, checkpoint, read_emotion_control(folder))


def _name_of(place: str) -> str:
    """Return what to call an adapter: the last part of its place that says something.

    >>> _name_of("user/moshi-happy"), _name_of("checkpoints/happy/checkpoint_000500/consolidated")
    ('moshi-happy', 'happy')
    """
    parts = Path(place).expanduser().absolute().parts
    telling = [part for part in parts if not re.fullmatch(r"checkpoint_\d+|best|consolidated|adapter", part)]
    return (telling or parts)[-1]


def _adapter(model: _Found) -> RuntimeAdapter:
    config = model.checkpoint.raw_config or {}
    assert model.checkpoint.lora_weights is not None
    try:
        rank, scaling = int(config["lora_rank"]), float(config["lora_scaling"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.place}: config.json does not say lora_rank and lora_scaling.", "Export the adapter again."
        ) from error
    return RuntimeAdapter(model.name, model.checkpoint.lora_weights, rank, scaling)


def _check_names(voices: Sequence[Voice]) -> None:
    names = [voice.name for voice in voices]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two voices are called {name!r}.", "Give one of them another name: NAME=REPO_OR_FOLDER.")


def _check_same_base(first: _Found, other: _Found) -> None:
    # The first repositories have no config.json, which their adapters have.
    configs = [_without_lora(model.checkpoint.lm_config or loaders._lm_kwargs) for model in (first, other)]
    if configs[0] != configs[1] or not _same_content(first.checkpoint.moshi_weights, other.checkpoint.moshi_weights):
        raise UserError(
            f"{first.place} {first.origin}, and {other.place} {other.origin}: these are not of one base.",
            "Name adapters that were trained on the same base.",
        )


def _same_content(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve() or filecmp.cmp(one, other, shallow=False)


def _without_lora(config: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if config is None else {key: value for key, value in config.items() if key not in LORA_KEYS}


def _nearest(name: str, names: Sequence[str]) -> str:
    return "".join(f"; nearest is {near!r}" for near in difflib.get_close_matches(name, names, n=1))
