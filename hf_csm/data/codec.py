"""Waveforms to Mimi codes, each channel by itself, the same codes that the streaming encoder of a server gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from hf_csm.units import SAMPLES_PER_FRAME


if TYPE_CHECKING:
    from moshi.models import MimiModel


@torch.no_grad()
def encode_waveforms(mimi: MimiModel, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encode conversations in one batch.

    Mimi is causal, so what pads the shorter ones to the longest changes none of their codes.

    Args:
        mimi: the codec, all codebooks active.
        waveforms: float32 `[2, S]` each, S a whole number of frames.

    Returns:
        int16 `[2, Q, T]` each.
    """
    device = next(mimi.parameters()).device
    longest = max(waveform.shape[1] for waveform in waveforms)
    batch = torch.zeros(2 * len(waveforms), 1, longest)
    for i, waveform in enumerate(waveforms):
        assert waveform.shape[0] == 2 and waveform.shape[1] % SAMPLES_PER_FRAME == 0, waveform.shape
        batch[2 * i : 2 * i + 2, 0, : waveform.shape[1]] = torch.from_numpy(waveform)
    # TF32 convolutions flip codes against the float32 of a CPU or of another GPU.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        codes = mimi.encode(batch.to(device)).to("cpu", torch.int16).numpy()
    return [
        codes[2 * i : 2 * i + 2, :, : waveform.shape[1] // SAMPLES_PER_FRAME].copy()
        for i, waveform in enumerate(waveforms)
    ]
