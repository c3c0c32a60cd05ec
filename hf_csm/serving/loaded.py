"""Load models into an engine, and steer its slots by adapter, emotion and strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_csm.errors import UserError
from hf_csm.models.device import choose_device
from hf_csm.serving.resolve import AdapterChoice, ResolvedModels, resolve_models


MAX_STRENGTH = 2.0
"""Twice the trained strength; beyond it the output degrades."""


@dataclass
class LoadedModel:
    """An engine with its adapters.

    Attributes:
        engine: the family's `Engine`; its adapters have the indices of `AdapterChoice.index`.
        tokenizer: of the text stream.
        resolved: metadata of the models.
    """

    engine: Any
    tokenizer: Any
    resolved: ResolvedModels

    @property
    def choices(self) -> list[AdapterChoice]:
        return list(self.resolved.choices)

    @property
    def base_name(self) -> str:
        return self.resolved.base_name

    @property
    def emotions(self) -> list[str]:
        return self.resolved.emotions

    def choose(self, emotion: str | None, adapter: str | None = None) -> AdapterChoice:
        """See `ResolvedModels.choose`."""
        return self.resolved.choose(emotion, adapter)

    def prefix(self, choice: AdapterChoice, emotion: str | None) -> list[int]:
        """Return the text tokens of the emotion prefix; empty if the adapter takes none."""
        return choice.control.tokens(emotion, self.tokenizer)

    def steer(self, slot: int, choice: AdapterChoice, emotion: str | None, strength: float = 1.0) -> None:
        """Activate only this adapter in `slot` from the next step on, and force the prefix of the emotion.

        The new prefix replaces the tokens of an earlier one that are still queued. Tokens already forced stay in the
        model's context: with `emotion` None no prefix is forced, but an earlier emotion still affects the voice.
        Training has prefixes only at the start of a window; later ones are out of distribution.
        """
        self.set_strength(slot, choice, strength)
        self.engine.force_text(slot, self.prefix(choice, emotion))

    def set_strength(self, slot: int, choice: AdapterChoice, strength: float) -> None:
        """Set the strength of this adapter in `slot`, and of all others to 0. Forces no text."""
        for other in self.resolved.choices:
            if other.index is not None:
                self.engine.set_strength(slot, other.index, strength if other.name == choice.name else 0.0)

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()


def load_model(
    names: Sequence[str],
    *,
    revision: str | None = None,
    num_slots: int = 1,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    **sampling: Any,
) -> LoadedModel:
    """Resolve and load models by name; see `resolve_models` and `load_weights`."""
    target = choose_device(device)
    return load_weights(resolve_models(names, revision), num_slots=num_slots, device=target, dtype=dtype, **sampling)


def load_weights(
    models: ResolvedModels,
    *,
    num_slots: int = 1,
    device: torch.device | str = "cpu",
    dtype: str | torch.dtype | None = None,
    **sampling: Any,
) -> LoadedModel:
    """Load the weights of resolved models.

    Args:
        num_slots: number of simultaneous conversations.
        dtype: of the language model; default: bfloat16 on a GPU, float32 elsewhere.
        sampling: options of the family's `open_engine`; override those of the checkpoint.

    Raises:
        UserError: weights are damaged, do not match the base model, or do not fit in memory.
    """
    family = models.family
    tokenizer = family.load_tokenizer(models.base)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        engine = family.open_engine(
            models.base, models.adapters, num_slots=num_slots, device=device, dtype=dtype, **sampling
        )
    except torch.OutOfMemoryError as error:
        raise engine_error(error, models.base_name, num_slots) from error
    return LoadedModel(engine, tokenizer, models)


def engine_error(error: BaseException, base_name: str, num_slots: int) -> UserError:
    """Convert an error raised while loading or running an engine."""
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            f"{base_name} does not fit in device memory with {num_slots} slot{'s' * (num_slots > 1)}.",
            "Stop other programs on the device, load fewer adapters, or use fewer --slots.",
        )
    reason = (str(error).splitlines() or [""])[0]
    return UserError(
        f"The engine failed: {type(error).__name__}: {reason}", "Run the command again with --debug for the traceback."
    )


def check_strength(strength: float) -> float:
    """Return `strength` if it is between 0 and `MAX_STRENGTH`.

    Raises:
        UserError: it is out of range.
    """
    if not 0.0 <= strength <= MAX_STRENGTH:
        raise UserError(
            f"The strength is {strength:g}.", f"Use 0 (base model) to {MAX_STRENGTH:g}; 1 is the trained adapter."
        )
    return strength
