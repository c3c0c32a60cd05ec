"""Generation with Moshi: several conversations at once, a frame of 80 ms at a time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.modules.streaming import State, StreamingModule

from hf_csm.errors import UserError
from hf_csm.models.family import Frame, RuntimeAdapter
from hf_csm.models.moshi.checkpoint import MoshiCheckpoint, load_mimi, load_tokenizer
from hf_csm.models.moshi.forced_text import Script, script_of, words_in
from hf_csm.models.moshi.model import load_moshi
from hf_csm.models.moshi.runtime_lora import Strengths, add_adapters
from hf_csm.units import SAMPLES_PER_FRAME


DECODER_PARTS = ("decoder", "decoder_transformer", "upsample")
NUM_WARM_UP_FRAMES = 4
"""As in moshi's server: compilation and CUDA graphs take the first few."""
SAMPLING_NAMES = {"temp": "temperature", "temp_text": "text_temperature", "top_k": "top_k", "top_k_text": "text_top_k"}
"""Sampling options in the `lm_gen_config` of a config.json, and their names in `Engine`."""


class Engine:
    """Independent conversations in `num_slots` slots, the `Engine` of `hf_csm.models.family`.

    Each slot runs the loop of `moshi.server`: with one slot and the same weights, seed and audio, the tokens are equal
    bit for bit. Not thread-safe.

    Attributes:
        padding_ids: tokens of the text stream that are no text.
    """

    def __init__(
        self,
        lm: LMModel,
        mimi: MimiModel,
        *,
        num_slots: int = 1,
        strengths: Strengths | None = None,
        tokenizer: sentencepiece.SentencePieceProcessor | None = None,
        use_sampling: bool = True,
        temperature: float = 0.8,
        text_temperature: float = 0.7,
        top_k: int = 250,
        text_top_k: int = 25,
    ):
        """Start streaming; the models must not be used elsewhere until `close`.

        Args:
            lm: in eval mode, without PEFT layers.
            mimi: its number of codebooks is set to that of `lm`.
            strengths: of `add_adapters`, with the same number of slots.
            tokenizer: of the text stream; needed for words only.
            temperature: of the audio, like `top_k`.
        """
        assert num_slots > 0, num_slots
        self.lm, self.mimi, self.num_slots = lm, mimi, num_slots
        self.padding_ids = frozenset({lm.end_of_text_padding_id, lm.text_padding_token_id})
        self._strengths, self._tokenizer = strengths, tokenizer
        self._scripts: dict[int, Script] = {}
        self._device = lm.device
        # The current device is per thread, initially 0, and CUDA graphs are captured on it; -1 is none.
        self._cuda_index = -1 if self._device.index is None else self._device.index
        mimi.set_num_codebooks(max(lm.dep_q, lm.n_q - lm.dep_q))
        self._generator = LMGen(
            lm.eval(),
            use_sampling=use_sampling,
            temp=temperature,
            temp_text=text_temperature,
            top_k=top_k,
            top_k_text=text_top_k,
            on_text_hook=self._on_text,
            support_out_of_sync=True,  # slots are at different steps of their conversations
        )
        self._contexts = [mimi.streaming(num_slots), self._generator.streaming(num_slots)]
        mimi_states = mimi.get_streaming_state()
        is_decoder = {name: name.split(".")[0] in DECODER_PARTS for name in mimi_states}
        self._encoder = _Running((mimi_states[name] for name in mimi_states if not is_decoder[name]), num_slots)
        self._decoder = _Running((mimi_states[name] for name in mimi_states if is_decoder[name]), num_slots)
        self._talker = _Running((*_states(self._generator), *_states(lm)), num_slots)
        self._num_steps = [0] * num_slots
        self._forced: list[deque[int]] = [deque() for _ in range(num_slots)]
        self._forced_now: dict[int, int] = {}
        self._stepping: list[int] = []
        self._was_forced: list[deque[bool]] = [
            deque() for _ in range(num_slots)
        ]  # of frames that are not returned yet, because of delays
        self._pcm = torch.zeros(num_slots, 1, SAMPLES_PER_FRAME)

    def warm_up(self) -> None:
        """Run a few frames in every slot, so that the first conversation starts at full speed."""
        silence = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)
        for _ in range(NUM_WARM_UP_FRAMES + self._generator.max_delay):
            self.step(dict.fromkeys(range(self.num_slots), silence))
        for slot in range(self.num_slots):
            self.reset(slot)

    def reset(self, slot: int, *, seed: int | None = None) -> None:
        """Begin a new conversation in this slot; strengths are kept.

        Args:
            seed: for reproducible sampling. Slots share one random state, so a seed needs an engine with one slot.

        Raises:
            ValueError: a seed, and several slots.
        """
        if seed is not None:
            if self.num_slots > 1:
                raise ValueError(f"seed is {seed}, but {self.num_slots} conversations share one random state")
            torch.manual_seed(seed)
        mask = self._mask([slot])
        with torch.no_grad(), torch.cuda.device(self._cuda_index):
            self.mimi.reset_streaming(mask)
            self._generator.reset_streaming(mask)
        self._restarted()
        self._num_steps[slot] = 0
        self._forced[slot].clear()
        self._was_forced[slot].clear()
        self._scripts.pop(slot, None)

    def force_text(self, slot: int, tokens: Sequence[int]) -> None:
        """Force these text tokens instead of sampled ones, one per step; they replace those still queued.

        In a new conversation the first one is in the first frame, as the prefix in training. An empty sequence clears
        the queue.
        """
        self._forced[slot] = deque(tokens)

    def force_words(self, slot: int, words: Sequence[str]) -> None:
        """Make the model say these words in a new conversation, after the text forced so far; see `Script`."""
        assert self._tokenizer is not None, "the engine has no tokenizer"
        assert self._num_steps[slot] == 0, "the conversation has begun"
        self._scripts[slot] = script_of(
            words,
            self._tokenizer,
            num_given=len(self._forced[slot]),
            padding_id=self.lm.text_padding_token_id,
            end_of_padding_id=self.lm.end_of_text_padding_id,
        )

    def last_word_frame(self, slot: int) -> int | None:
        """Return the frame with the last token of the forced words; None before it."""
        return self._scripts[slot].last_frame

    def words_in(self, text_tokens: Sequence[int]) -> list[dict[str, Any]]:
        """Return the words of a text stream: `word`, and `start_s` in seconds from its first frame."""
        assert self._tokenizer is not None, "the engine has no tokenizer"
        return words_in(text_tokens, self._tokenizer, self.padding_ids)

    def set_strength(self, slot: int, adapter: int, strength: float) -> None:
        """Set the strength of an adapter in a slot, from the next step on; see `Strengths`."""
        assert self._strengths is not None, "the engine has no adapters"
        self._strengths.set(slot, adapter, strength)

    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Frame]:
        """Feed the user's next frame to each named slot and return the frames generated; other slots do not advance.

        The first frame of a slot only initializes the model, and Mimi is reset after it, as in `moshi.server`.
        The first `max(delays)` steps return no frame.

        Args:
            frames: the user's audio by slot, `[1920]`, float32, 24 kHz.
        """
        with torch.no_grad(), torch.cuda.device(self._cuda_index):
            return self._step(frames)

    def _step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Frame]:
        slots = sorted(frames)
        for slot in slots:
            assert frames[slot].shape == (SAMPLES_PER_FRAME,), frames[slot].shape
            self._pcm[slot, 0] = torch.from_numpy(frames[slot])
        self._encoder.only(slots)
        codes = self.mimi.encode(self._pcm.to(self._device))
        new = [slot for slot in slots if self._num_steps[slot] == 0]
        if new:
            self.mimi.reset_streaming(self._mask(new))
            self._restarted()
        self._forced_now = {
            slot: self._forced[slot].popleft()
            for slot in slots
            if self._forced[slot] and self._num_steps[slot] >= self.lm.delays[0]
        }
        self._talker.only(slots)
        self._stepping = slots
        tokens = self._generator.step(codes)
        assert tokens is not None
        for slot in slots:
            if self._num_steps[slot] >= self.lm.delays[0]:
                self._was_forced[slot].append(slot in self._forced_now)
            self._num_steps[slot] += 1
        speaking = [slot for slot in slots if self._num_steps[slot] > self._generator.max_delay]
        if not speaking:
            return {}
        self._decoder.only(speaking)
        audio = self.mimi.decode(tokens[:, 1:].clamp(min=0))[:, 0].float().cpu().numpy()
        said = tokens[:, :, 0].cpu().numpy()
        return {
            slot: Frame(
                int(said[slot, 0]), audio[slot].copy(), said[slot, 1:].copy(), self._was_forced[slot].popleft()
            )
            for slot in speaking
        }

    def close(self) -> None:
        """End streaming."""
        for context in reversed(self._contexts):
            context.close()

    def _on_text(self, text_tokens: torch.Tensor) -> None:
        for slot, token in self._forced_now.items():
            text_tokens[slot] = token
        for slot in self._stepping:
            if slot in self._scripts:
                text_tokens[slot] = self._scripts[slot].follow(int(text_tokens[slot]))

    def _mask(self, slots: Collection[int]) -> torch.Tensor:
        return torch.tensor([slot in slots for slot in range(self.num_slots)], device=self._device)

    def _restarted(self) -> None:
        # moshi sets the execution mask of a slot that is reset.
        for part in (self._encoder, self._decoder, self._talker):
            part.forget()


def open_engine(
    checkpoint: MoshiCheckpoint,
    adapters: Sequence[RuntimeAdapter] = (),
    *,
    num_slots: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **sampling: Any,
) -> Engine:
    """Load a base or merged model and adapters of it into an engine.

    Args:
        dtype: of the language model; by default bfloat16 on a GPU, float32 elsewhere.
        sampling: options of `Engine`, in place of those in the checkpoint's config.json; None keeps those.

    Raises:
        UserError: weights are damaged or do not fit the base.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config: dict[str, Any] = checkpoint.lm_gen_config
    if not isinstance(config, dict) or not all(
        isinstance(config.get(name, 0), (int, float)) for name in SAMPLING_NAMES
    ):
        raise UserError(
            f"{checkpoint.name_or_path}: lm_gen_config in config.json is {str(config)[:100]}.",
            f"Correct it: an object with numbers for some of {', '.join(SAMPLING_NAMES)}, or remove it.",
        )
    options = {
        SAMPLING_NAMES.get(name, name): value
        for name, value in config.items()
        if name in SAMPLING_NAMES or name == "use_sampling"
    }
    ignored = config.keys() - SAMPLING_NAMES.keys() - {"use_sampling"}
    if ignored:
        warnings.warn(f"{checkpoint.name_or_path} asks for {', '.join(sorted(ignored))}: ignored.", stacklevel=2)
    options |= {name: value for name, value in sampling.items() if value is not None}
    lm = load_moshi(checkpoint, device=device, dtype=dtype).lm.eval()
    mimi = load_mimi(checkpoint, device)
    strengths = None
    if adapters:
        strengths = add_adapters(lm, adapters, num_slots=num_slots, base_name=checkpoint.name_or_path)
    tokenizer = load_tokenizer(checkpoint)
    return Engine(lm, mimi, num_slots=num_slots, strengths=strengths, tokenizer=tokenizer, **options)


class _Running:
    """Execution mask of some streaming modules: which slots run. All their states share one tensor."""

    def __init__(self, states: Iterable[State], num_slots: int):
        states = list(states)
        self._mask = states[0].exec_mask
        for state in states:
            state.exec_mask = self._mask
        self._num_slots = num_slots
        self._slots: list[int] | None = list(range(num_slots))

    def only(self, slots: list[int]) -> None:
        """Run these slots only."""
        if slots != self._slots:
            self._mask.copy_(torch.tensor([slot in slots for slot in range(self._num_slots)]))
            self._slots = slots

    def forget(self) -> None:
        """Write the mask again at the next step."""
        self._slots = None


def _states(module: StreamingModule) -> list[State]:
    return list(module.get_streaming_state().values())
