"""Conversations with Moshi, several at once, a frame of 80 ms at a time: what the server and offline use run on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.modules.streaming import State, StreamingModule

from hf_csm.models.moshi.runtime_lora import Strengths
from hf_csm.units import SAMPLES_PER_FRAME


DECODER_PARTS = ("decoder", "decoder_transformer", "upsample")
NUM_WARM_UP_FRAMES = 4
"""As in moshi's server: compilation and CUDA graphs take the first few."""


@dataclass(frozen=True)
class Frame:
    """What Moshi says in one frame.

    Attributes:
        text_token: of the text stream; one of `Engine.padding_ids` where no word goes on.
        audio: `[1920]`, float32, 24 kHz.
        codes: `[Q]`, int64, Moshi's own codebooks.
        is_told: the text token is one of `Engine.force_text`: what Moshi was told is nothing it says.
    """

    text_token: int
    audio: np.ndarray
    codes: np.ndarray
    is_told: bool = False


class Engine:
    """`num_slots` conversations at once; each goes at its own pace and knows nothing of the others.

    It does for each slot what `moshi.server` does for its one conversation. With one slot and the same weights, seed
    and audio it gives the server's tokens, bit for bit. Not thread-safe: one thread calls it.

    Attributes:
        padding_ids: tokens of the text stream that are no text.
        text_policy: called with the sampled text tokens, `[B]` on the device, before the audio of the frame is
            sampled; may change them in place.
    """

    def __init__(
        self,
        lm: LMModel,
        mimi: MimiModel,
        *,
        num_slots: int = 1,
        strengths: Strengths | None = None,
        use_sampling: bool = True,
        temperature: float = 0.8,
        text_temperature: float = 0.7,
        top_k: int = 250,
        text_top_k: int = 25,
    ):
        """Start streaming; the two models are the engine's until `close`.

        Args:
            lm: in eval mode, without PEFT layers.
            mimi: gets as many codebooks as `lm` has.
            strengths: what `add_adapters` gave, made for as many slots.
            temperature: of the audio; `top_k` too.
        """
        assert num_slots > 0, num_slots
        self.lm, self.mimi, self.num_slots = lm, mimi, num_slots
        self.padding_ids = frozenset({lm.end_of_text_padding_id, lm.text_padding_token_id})
        self.text_policy: Callable[[torch.Tensor], None] | None = None
        self._strengths = strengths
        self._device = lm.device
        # Each thread has a current device of its own, 0 at first, and CUDA graphs are captured on it; -1 is none.
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
        self._told: list[deque[bool]] = [deque() for _ in range(num_slots)]  # of the frames that are not out yet
        self._pcm = torch.zeros(num_slots, 1, SAMPLES_PER_FRAME)

    def warm_up(self) -> None:
        """Run a few frames in every slot, so that the first conversation starts at full speed."""
        silence = np.zeros(SAMPLES_PER_FRAME, dtype=np.float32)
        for _ in range(NUM_WARM_UP_FRAMES + self._generator.max_delay):
            self.step(dict.fromkeys(range(self.num_slots), silence))
        for slot in range(self.num_slots):
            self.reset(slot)

    def reset(self, slot: int, *, seed: int | None = None) -> None:
        """Begin a new conversation in this slot; strengths stay as they are.

        Args:
            seed: makes what is sampled repeatable. The slots share one random state, so only where there is one.

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
        self._told[slot].clear()

    def force_text(self, slot: int, tokens: Sequence[int]) -> None:
        """Write these tokens over what Moshi samples for its text, one a step, in place of those still to be written.

        In a new conversation the first one stands in the first frame, as the prefix does in training. What was
        written before stays in the stream, be it whole or a part; no tokens end the writing.
        """
        self._forced[slot] = deque(tokens)

    def set_strength(self, slot: int, adapter: int, strength: float) -> None:
        """Set the strength of an adapter in a slot, from the next step on; see `Strengths`."""
        assert self._strengths is not None, "the engine has no adapters"
        self._strengths.set(slot, adapter, strength)

    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Frame]:
        """Let the named slots hear a frame each, and return what Moshi says in them; the other slots stand still.

        A slot's first frame after `reset` only starts the model, and Mimi starts anew after it, as in `moshi.server`.
        Delays hold the output back: its first `max(delays)` frames give nothing.

        Args:
            frames: for each slot what its user says, `[1920]`, float32, 24 kHz.
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
        tokens = self._generator.step(codes)
        assert tokens is not None
        for slot in slots:
            if self._num_steps[slot] >= self.lm.delays[0]:
                self._told[slot].append(slot in self._forced_now)
            self._num_steps[slot] += 1
        speaking = [slot for slot in slots if self._num_steps[slot] > self._generator.max_delay]
        if not speaking:
            return {}
        self._decoder.only(speaking)
        audio = self.mimi.decode(tokens[:, 1:].clamp(min=0))[:, 0].float().cpu().numpy()
        said = tokens[:, :, 0].cpu().numpy()
        return {
            slot: Frame(int(said[slot, 0]), audio[slot].copy(), said[slot, 1:].copy(), self._told[slot].popleft())
            for slot in speaking
        }

    def close(self) -> None:
        """End streaming; the models are free again."""
        for context in reversed(self._contexts):
            context.close()

    def _on_text(self, text_tokens: torch.Tensor) -> None:
        for slot, token in self._forced_now.items():
            text_tokens[slot] = token
        if self.text_policy is not None:
            self.text_policy(text_tokens)

    def _mask(self, slots: Collection[int]) -> torch.Tensor:
        return torch.tensor([slot in slots for slot in range(self.num_slots)], device=self._device)

    def _restarted(self) -> None:
        # moshi sets a slot that starts anew running.
        for part in (self._encoder, self._decoder, self._talker):
            part.forget()


class _Running:
    """Which slots of some streaming modules run. All their states read one mask, so that one write reaches them."""

    def __init__(self, states: Iterable[State], num_slots: int):
        states = list(states)
        self._mask = states[0].exec_mask
        for state in states:
            state.exec_mask = self._mask
        self._num_slots = num_slots
        self._slots: list[int] | None = list(range(num_slots))

    def only(self, slots: list[int]) -> None:
        """Let these slots run and the others stand still."""
        if slots != self._slots:
            self._mask.copy_(torch.tensor([slot in slots for slot in range(self._num_slots)]))
            self._slots = slots

    def forget(self) -> None:
        """Write the mask again before the next step."""
        self._slots = None


def _states(module: StreamingModule) -> list[State]:
    return list(module.get_streaming_state().values())
