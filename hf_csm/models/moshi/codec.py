"""Waveforms to Mimi codes, one channel at a time, equal to those of the server's streaming encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.utils.compile import CUDAGraphed

from hf_csm.models.moshi.checkpoint import MoshiCheckpoint, load_mimi
from hf_csm.units import SAMPLES_PER_FRAME


class MimiCodec:
    """Mimi as a `Codec`."""

    def __init__(self, mimi: MimiModel):
        self.mimi = mimi

    @property
    def num_codebooks(self) -> int:
        """Q."""
        return self.mimi.num_codebooks

    @property
    def device(self) -> torch.device:
        """Device of the codec."""
        return next(self.mimi.parameters()).device

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `encode_waveforms`."""
        return encode_waveforms(self.mimi, waveforms)


def load_codec(checkpoint: MoshiCheckpoint, device: torch.device | str = "cpu") -> MimiCodec:
    """Load Mimi with all the codebooks it has."""
    return MimiCodec(load_mimi(checkpoint, device))


@torch.no_grad()
def encode_waveforms(mimi: MimiModel, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encode conversations in one batch.

    Mimi is causal, so padding the shorter ones does not change their codes.

    Args:
        mimi: the codec, all codebooks active.
        waveforms: float32 `[2, S]` each, S a whole number of frames.

    Returns:
        int16 `[2, Q, T]` each.
    """
    device, dtype = next(mimi.parameters()).device, next(mimi.parameters()).dtype
    longest = max(waveform.shape[1] for waveform in waveforms)
    batch = torch.zeros(2 * len(waveforms), 1, longest)
    for i, waveform in enumerate(waveforms):
        assert waveform.shape[0] == 2 and waveform.shape[1] % SAMPLES_PER_FRAME == 0, waveform.shape
        batch[2 * i : 2 * i + 2, 0, : waveform.shape[1]] = torch.from_numpy(waveform)
    # TF32 convolutions flip codes against the float32 of a CPU or of another GPU.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        codes = _encode_as_streamed(mimi, batch.to(device, dtype)).to("cpu", torch.int16).numpy()
    return [
        codes[2 * i : 2 * i + 2, :, : waveform.shape[1] // SAMPLES_PER_FRAME].copy()
        for i, waveform in enumerate(waveforms)
    ]


def _encode_as_streamed(mimi: MimiModel, audio: torch.Tensor) -> torch.Tensor:
    """Encode `[B, 1, S]` to codes `[B, Q, T]` as a server does, 80 ms at a time.

    Only the transformer needs the small steps. Its cache holds `context` positions and each step writes two of them,
    so beyond 10 s every other position attends to one position less than over the whole window. The convolutions,
    nearly all of the work, are equal either way.
    """
    latents = mimi.encoder(audio)
    steps_per_frame = latents.shape[-1] * SAMPLES_PER_FRAME // audio.shape[-1]
    transformer = CUDAGraphed(mimi.encoder_transformer, disable=audio.device.type != "cuda")
    with mimi.encoder_transformer.streaming(len(audio)):
        # A graph writes its output in place: keep a copy.
        steps = [transformer(step.contiguous())[0].clone() for step in latents.split(steps_per_frame, dim=-1)]
    return mimi.quantizer.encode(mimi._to_framerate(torch.cat(steps, dim=-1)))
