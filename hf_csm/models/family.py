"""The interface of a model family: a record of functions, and the types that they share.

`hf_csm.models.get_family` returns the record of a checkpoint. Training, encode, publish, evaluation and serving call
its functions and import no family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hf_csm.config import LossConfig
from hf_csm.units import Frames


NO_TOKEN = -1
"""No token here: nothing is fed to the model and nothing is predicted, in every stream."""


@dataclass(frozen=True)
class Layout:
    """Token streams of a model. Stream 0 is text, then audio, the model's own channel first.

    Attributes:
        delays: frames by which the model shifts each stream, one per stream, `[K]`.
        num_predicted_codebooks: codebooks of the model's own channel, which it predicts: streams 1 to this number.
        num_user_codebooks: codebooks of the user's channel, an input only: the streams after those.
        text_padding_id: text token of a frame without a word.
        end_of_text_padding_id: text token of the frame before a word begins.
        text_card: number of text tokens.
        card: number of codes of a codebook.
    """

    delays: tuple[int, ...]
    num_predicted_codebooks: int
    num_user_codebooks: int
    text_padding_id: int
    end_of_text_padding_id: int
    text_card: int
    card: int

    @property
    def num_streams(self) -> int:
        """K: the text stream and the audio streams of both channels."""
        return 1 + self.num_predicted_codebooks + self.num_user_codebooks

    @property
    def num_predicted_streams(self) -> int:
        """Streams with a loss, which are the first ones: text and the model's own codebooks."""
        return 1 + self.num_predicted_codebooks

    @property
    def max_delay(self) -> int:
        """Frames of `NO_TOKEN` at the end of a window that keep all targets in spite of the delays."""
        return max(self.delays)


@dataclass(frozen=True)
class Window:
    """A training example: the token streams of one conversation.

    Attributes:
        id: the row it comes from.
        codes: int64 `[K, T]`; `NO_TOKEN` where there is none.
        num_given: frames at the start of the text stream that are given, not predicted: the emotion prefix.
    """

    id: str
    codes: np.ndarray
    num_given: Frames


@dataclass(frozen=True)
class TokenNLL:
    """Negative log-likelihood of each token.

    Attributes:
        nll: `[B, K, T]`, nats, float32; 0 where `mask` is false.
        mask: `[B, K, T]`, true where the model predicts an existing token.
    """

    nll: torch.Tensor
    mask: torch.Tensor


class SpeechLM(torch.nn.Module):
    """A conversational speech model over K token streams, text first.

    Attributes:
        layout: its streams.
    """

    layout: Layout

    def forward(self, codes: torch.Tensor) -> TokenNLL:
        """Score `codes [B, K, T]` (int64, `NO_TOKEN` for no token), teacher forced."""
        raise NotImplementedError


class Checkpoint(Protocol):
    """The files of a model, found but not loaded.

    Attributes:
        name_or_path: Hub repository, or absolute path of the local folder.
        revision: of the Hub repository, if one was given.
        is_local: `name_or_path` is a folder.
        lora_weights: the adapter's file in the family's own format; None for a model without adapter.
    """

    name_or_path: str
    revision: str | None
    lora_weights: Path | None

    @property
    def is_local(self) -> bool: ...


class Codec(Protocol):
    """An audio codec with all its codebooks active."""

    @property
    def num_codebooks(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode conversations, float32 `[2, S]` each, to int16 `[2, Q, T]` each, one channel at a time."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back, such as a SentencePiece model."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


@dataclass(frozen=True)
class RuntimeAdapter:
    """An adapter in the family's own format, whose strength an engine sets while it generates.

    Attributes:
        name: in messages.
        weights: file.
        rank: of its matrices.
        scaling: of their product at strength 1.
    """

    name: str
    weights: Path
    rank: int
    scaling: float


@dataclass(frozen=True)
class Frame:
    """One generated frame.

    Attributes:
        text_token: of the text stream; one of `Engine.padding_ids` in a frame without a word.
        audio: `[1920]`, float32, 24 kHz.
        codes: `[Q]`, int64, the model's own codebooks.
        is_forced: the text token is from `Engine.force_text`.
    """

    text_token: int
    audio: np.ndarray
    codes: np.ndarray
    is_forced: bool = False


class Engine(Protocol):
    """Generates conversations in `num_slots` slots, one frame of 80 ms per step. Not thread-safe.

    Attributes:
        padding_ids: padding tokens of the text stream.
    """

    num_slots: int
    padding_ids: frozenset[int]

    def warm_up(self) -> None:
        """Run a few frames in every slot, so that the first conversation starts at full speed."""
        ...

    def reset(self, slot: int, *, seed: int | None = None) -> None:
        """Begin a new conversation in a slot; strengths are kept. A seed needs an engine with one slot."""
        ...

    def force_text(self, slot: int, tokens: Sequence[int]) -> None:
        """Force these text tokens instead of sampled ones; they replace those still queued."""
        ...

    def force_words(self, slot: int, words: Sequence[str]) -> None:
        """Make the model say these words in a new conversation, after `force_text`; it decides when each begins."""
        ...

    def last_word_frame(self, slot: int) -> int | None:
        """Return the frame, from 0, with the last text token of the forced words; None before it."""
        ...

    def words_in(self, text_tokens: Sequence[int]) -> list[dict[str, Any]]:
        """Return the words of a text stream: `word`, and `start_s` in seconds from its first frame."""
        ...

    def set_strength(self, slot: int, adapter: int, strength: float) -> None:
        """Set the strength of an adapter in a slot, from the next step on: 0 is the base, 1 the trained adapter."""
        ...

    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Frame]:
        """Feed the user's next frame, `[1920]`, to each named slot; return the frames generated, by slot."""
        ...

    def close(self) -> None:
        """Free the models."""
        ...


@dataclass(frozen=True)
class Family:
    """The functions of a model family.

    Attributes:
        name: of the family.
        stream_names: groups of targets whose loss is logged separately.

        find_checkpoint: `(name_or_folder, revision=None)`: find the files of a model; downloads missing ones.
        load_lm: `(checkpoint, *, device, dtype, gradient_checkpointing=False)`.
        load_codec: `(checkpoint, device)`.
        load_tokenizer: `(checkpoint)`.
        codec_sha256: `(checkpoint)`: equal for two checkpoints if and only if their codecs give the same codes.
        base_urls: `(name_or_folder, revision=None)`: the URL, `hf://` or `file://`, of a base's weights, and the list
            of those of its other files, as an exported config.json names them; nothing large is downloaded.

        lay_out: `(row, layout, tokenize, *, prefix=None, max_frames=None)`: lay out a row of a codes table as streams.
        stream_masks: `(codes, num_given, layout)`: bool `[G, B, K, T]`, the targets of each of `stream_names`.
        stream_weights: `(config)`: the weight in the loss of a target of each group, `G` numbers.

        add_lora: `(model, *, rank, alpha, target_modules, dropout=0.0, seed=0)`: wrap the model in a fresh adapter.
        load_adapter: `(model, folder)`: load an adapter in PEFT's format, adding it if the model has none.
        save_adapter: `(model, folder)`: write the adapter in PEFT's format.
        adapter_parameters: `(model)`: the trainable weights, in a fixed order.
        adapter_disabled: `(model)`: a context in which the model is its base.

        adapter_files: names of the files that `export_adapter` writes.
        merged_files: names of the files that `merge_adapter` writes.
        export_adapter: `(model_or_folder, checkpoint, folder)`: write the adapter in the family's own format and
            check its names and shapes; `checkpoint` is the base.
        merge_adapter: `(adapter_folder, checkpoint, folder)`: write the base with the adapter merged in, and check its
            bytes.
        verify_export: `(folder, adapter_folder, checkpoint, *, device, dtype=bfloat16)`: load an exported adapter or a
            merged model through the family's own loader and compare it with the trained model, with one base in memory
            at a time; returns the largest difference of two logits.

        split_adapter: `(checkpoint, name)`: the checkpoint of the base, and the `RuntimeAdapter` if there is one.
        is_same_base: `(checkpoint, other)`: whether two checkpoints have the same base weights.
        open_engine: `(checkpoint, adapters=(), *, num_slots=1, device="cpu", dtype=None, **sampling)`: load a base and
            its adapters into an engine; by default bfloat16 on a GPU, float32 elsewhere, and the sampling options of
            the checkpoint.
    """

    name: str
    stream_names: tuple[str, ...]

    find_checkpoint: Callable[..., Any]
    load_lm: Callable[..., Any]
    load_codec: Callable[..., Codec]
    load_tokenizer: Callable[..., Any]
    codec_sha256: Callable[[Any], str]
    base_urls: Callable[..., tuple[str, list[str]]]

    lay_out: Callable[..., Window]
    stream_masks: Callable[[torch.Tensor, torch.Tensor, Layout], torch.Tensor]
    stream_weights: Callable[[LossConfig], Sequence[float]]

    add_lora: Callable[..., Any]
    load_adapter: Callable[[Any, Path], Any]
    save_adapter: Callable[[Any, Path], None]
    adapter_parameters: Callable[[Any], list[torch.nn.Parameter]]
    adapter_disabled: Callable[[Any], AbstractContextManager[None]]

    adapter_files: tuple[str, ...]
    merged_files: tuple[str, ...]
    export_adapter: Callable[[Any, Any, Path], Any]
    merge_adapter: Callable[[Path, Any, Path], None]
    verify_export: Callable[..., float]

    split_adapter: Callable[[Any, str], tuple[Any, RuntimeAdapter | None]]
    is_same_base: Callable[[Any, Any], bool]
    open_engine: Callable[..., Any]
