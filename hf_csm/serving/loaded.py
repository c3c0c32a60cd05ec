"""Models loaded into an engine, and their voices steered: with which adapter, emotion and strength Moshi speaks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sentencepiece
import torch

from hf_csm.errors import UserError
from hf_csm.models.moshi.checkpoint import choose_device, load_mimi, load_tokenizer
from hf_csm.models.moshi.engine import Engine
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.runtime_lora import add_adapters
from hf_csm.serving.resolve import BASE, Models, Voice, find_models


__all__ = [
    "BASE",
    "MAX_STRENGTH",
    "Models",
    "Speaker",
    "Voice",
    "check_strength",
    "choose_device",
    "explain_failure",
    "find_models",
    "load_models",
    "load_speaker",
]

MAX_STRENGTH = 2.0
"""Twice what was trained; beyond it Moshi falls apart."""
SAMPLING_NAMES = {"temp": "temperature", "temp_text": "text_temperature", "top_k": "top_k", "top_k_text": "text_top_k"}
"""moshi's names of the options of sampling, as in `lm_gen_config` of a config.json, and the engine's."""


@dataclass
class Speaker:
    """Everything loaded: what a server or a command speaks with.

    Attributes:
        engine: generates; its adapters are numbered as in the voices.
        tokenizer: of the text stream.
        models: what was found before it was loaded.
    """

    engine: Engine
    tokenizer: sentencepiece.SentencePieceProcessor
    models: Models

    @property
    def voices(self) -> list[Voice]:
        return list(self.models.voices)

    @property
    def base_name(self) -> str:
        return self.models.base_name

    @property
    def emotions(self) -> list[str]:
        return self.models.emotions

    def choose(self, emotion: str | None, voice: str | None = None) -> Voice:
        """See `Models.choose`."""
        return self.models.choose(emotion, voice)

    def prefix(self, voice: Voice, emotion: str | None) -> list[int]:
        """Return the text tokens that tell `voice` an emotion it knows; none if it is not told."""
        return voice.control.tokens(emotion, self.tokenizer)

    def steer(self, slot: int, voice: Voice, emotion: str | None, strength: float = 1.0) -> None:
        """Speak in `slot` with this voice alone from the next step on, and tell it the emotion by its prefix.

        The prefix takes the place of what is still to be told; one that is half told is followed by the whole new one.
        What was told stays in Moshi's context: without a prefix, as with `emotion` None, nothing more is asked for,
        but an earlier emotion goes on colouring what it says. In training a prefix stands only at the beginning; later
        ones are beyond what the model has seen.
        """
        self.weigh(slot, voice, strength)
        self.engine.force_text(slot, self.prefix(voice, emotion))

    def weigh(self, slot: int, voice: Voice, strength: float) -> None:
        """Set the strength of the voice that speaks in `slot`, of the others 0, and tell it nothing."""
        for other in self.models.voices:
            if other.adapter is not None:
                self.engine.set_strength(slot, other.adapter, strength if other.name == voice.name else 0.0)

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()


def load_speaker(
    names: Sequence[str],
    *,
    revision: str | None = None,
    num_slots: int = 1,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    **sampling: Any,
) -> Speaker:
    """Find models by name and load them; see `find_models` and `load_models`."""
    chosen = choose_device(device)
    return load_models(find_models(names, revision), num_slots=num_slots, device=chosen, dtype=dtype, **sampling)


def load_models(
    models: Models,
    *,
    num_slots: int = 1,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype | None = None,
    **sampling: Any,
) -> Speaker:
    """Load the weights.

    Args:
        num_slots: conversations at once.
        dtype: of the language model; by default bfloat16 on a GPU, float32 elsewhere.
        sampling: options of `Engine`, in place of those of the model's config.json.

    Raises:
        UserError: weights are damaged, do not fit the base or the device.
    """
    device = torch.device(device)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = {
        SAMPLING_NAMES.get(name, name): value
        for name, value in models.base.lm_gen_config.items()
        if name in SAMPLING_NAMES or name == "use_sampling"
    }
    ignored = models.base.lm_gen_config.keys() - SAMPLING_NAMES.keys() - {"use_sampling"}
    if ignored:
        warnings.warn(f"{models.base_name} asks for {', '.join(sorted(ignored))}: ignored.", stacklevel=2)
    options |= {name: value for name, value in sampling.items() if value is not None}
    tokenizer = load_tokenizer(models.base)
    try:
        lm = load_moshi(models.base, device=device, dtype=dtype).lm.eval()
        mimi = load_mimi(models.base, device)
        strengths = None
        if models.adapters:
            strengths = add_adapters(lm, models.adapters, num_slots=num_slots, base_name=models.base_name)
        engine = Engine(lm, mimi, num_slots=num_slots, strengths=strengths, **options)
    except torch.OutOfMemoryError as error:
        raise explain_failure(error, models.base_name, num_slots) from error
    return Speaker(engine, tokenizer, models)


def explain_failure(error: BaseException, base_name: str, num_slots: int) -> UserError:
    """Return what to say of an engine that raised `error`, as it was loaded or later."""
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"{base_name} does not fit in the memory of the device with {num_slots} slot{'s' * (num_slots > 1)}.",
            "End what else uses it, load fewer adapters, or ask for fewer slots.",
        )
    reason = (str(error).splitlines() or [""])[0]
    return UserError(
        f"The engine failed: {type(error).__name__}: {reason}", "Run the same command again; --debug shows where."
    )


def check_strength(strength: float) -> float:
    """Return `strength` if it is 0 to `MAX_STRENGTH`.

    Raises:
        UserError: it is not.
    """
    if not 0.0 <= strength <= MAX_STRENGTH:
        raise UserError(
            f"The strength is {strength:g}.", f"Give 0 (the base) to {MAX_STRENGTH:g}; 1 is the adapter as trained."
        )
    return strength
