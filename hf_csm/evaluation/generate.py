"""Let Moshi talk: free-running generation through moshi's own streaming, frame by frame as its server does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel

from hf_csm.data.audio import room_tone
from hf_csm.units import SAMPLES_PER_FRAME


ROOM_TONE_DB = -60.0
"""Level of what Moshi hears where the user is silent, as in training: it has never heard digital silence."""


@dataclass(frozen=True)
class Generation:
    """What Moshi said.

    Attributes:
        audio: `[S]`, float32, 24 kHz, 1,920 samples a frame.
        text_tokens: `[T]`, the text stream.
        codes: `[Q, T]`, Moshi's own codebooks.
    """

    audio: torch.Tensor
    text_tokens: torch.Tensor
    codes: torch.Tensor


@torch.no_grad()
def generate(
    lm: LMModel,
    mimi: MimiModel,
    *,
    user_audio: torch.Tensor | None,
    num_frames: int,
    prefix_tokens: Sequence[int] = (),
    use_sampling: bool = True,
    temperature: float = 0.8,
    text_temperature: float = 0.7,
    top_k: int = 250,
    text_top_k: int = 25,
    seed: int = 0,
) -> Generation:
    """Generate `num_frames` frames of Moshi's side while the user says `user_audio`.

    The same arguments give the same result; the caller's random state is left as it was.

    Args:
        lm: without PEFT layers, which do not stream: from `merged` or moshi's loader.
        user_audio: `[S]`, 24 kHz; cut after the last frame, room tone after its end; None is room tone all along.
        prefix_tokens: text tokens given instead of predicted in the first frames.
        use_sampling: False takes the likeliest token each time.
    """
    assert num_frames > 0, num_frames
    was_training, num_active = lm.training, mimi.num_codebooks
    cuda = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        # Delays hold the output back: the last frame is out `max(delays)` steps after the step that predicts its text.
        num_steps = num_frames + max(lm.delays)
        user_frames = _user_frames(user_audio, num_steps - 1, seed).to(next(mimi.parameters()).device)
        try:
            mimi.set_num_codebooks(max(lm.dep_q, lm.n_q - lm.dep_q))
            generator = LMGen(
                lm.eval(),
                use_sampling=use_sampling,
                temp=temperature,
                temp_text=text_temperature,
                top_k=top_k,
                top_k_text=text_top_k,
                on_text_hook=_Prefix(prefix_tokens, lm.delays[0]),
            )
            return _run(generator, mimi, user_frames)
        finally:
            mimi.set_num_codebooks(num_active)
            lm.train(was_training)


class _Prefix:
    """Writes the prefix over the text tokens that moshi sampled, in their frames; a hook of `LMGen`."""

    def __init__(self, tokens: Sequence[int], delay: int):
        self.forced = {delay + frame: token for frame, token in enumerate(tokens)}
        self.step = 0

    def __call__(self, text_token: torch.Tensor) -> None:
        if self.step in self.forced:
            text_token.fill_(self.forced[self.step])
        self.step += 1


def _run(generator: LMGen, mimi: MimiModel, user_frames: torch.Tensor) -> Generation:
    tokens, audio = [], []
    with mimi.streaming(1), generator.streaming(1):
        # Step 0 precedes the first frame: moshi feeds its start tokens and ignores the codes it is given. The server
        # spends the user's first 80 ms on it and then starts the encoder anew; here it gets any codes.
        nothing = torch.zeros(1, mimi.num_codebooks, 1, dtype=torch.long, device=user_frames.device)
        frames = user_frames.split(SAMPLES_PER_FRAME, dim=-1)
        for codes in itertools.chain([nothing], map(mimi.encode, frames)):
            output = generator.step(codes)
            if output is not None:
                tokens.append(output[0, :, 0].cpu())
                audio.append(mimi.decode(output[:, 1:])[0, 0].float().cpu())
    streams = torch.stack(tokens, dim=1)
    return Generation(torch.cat(audio), streams[0], streams[1:])


def _user_frames(user_audio: torch.Tensor | None, num_frames: int, seed: int) -> torch.Tensor:
    """Return `[1, 1, num_frames * 1920]`: the user's audio over room tone."""
    num_samples = num_frames * SAMPLES_PER_FRAME
    audio = torch.from_numpy(room_tone(num_samples, np.random.default_rng(seed), (ROOM_TONE_DB, ROOM_TONE_DB)))
    if user_audio is not None:
        assert user_audio.dim() == 1, f"user_audio must be [S], not {list(user_audio.shape)}"
        spoken = user_audio[:num_samples].float().cpu()
        audio[: len(spoken)] = spoken
    return audio[None, None]
