"""Word times for corpora that ship none: CTC forced alignment if a model is given, else the energy of the clip."""

from __future__ import annotations

import functools
import math
import re
import warnings
from typing import Any

import numpy as np

from hf_csm.errors import UserError


FRAME_S = 0.010
# A frame is voiced if it is this far below the loudest one at most, and this far above the room.
_BELOW_PEAK_DB = 38.0
_ABOVE_FLOOR_DB = 10.0
# Pauses shorter than this are stops and weak consonants inside words.
_SHORTEST_PAUSE_S = 0.12
_SHORTEST_VOICED_S = 0.03
# Quiet onsets and releases fall under the threshold: widen what was found.
_MARGIN_S = 0.02

_VOWELS = re.compile("[aeiouyàáâãäåæèéêëìíîïòóôõöøùúûüýÿœ]+", re.IGNORECASE)


def energy_align(samples: np.ndarray, sample_rate: int, words: list[str]) -> list[dict[str, Any]]:
    """Spread words over the voiced part of a clip in proportion to their length; pauses are skipped.

    Args:
        samples: float `[S]`.
        sample_rate: of the samples.
        words: as spoken, at least one.

    Returns:
        `{"word", "start_s", "end_s"}` for each word: ascending, not overlapping, inside the clip.
    """
    assert words and len(samples), (len(words), len(samples))
    duration_s = len(samples) / sample_rate
    spans_s = voiced_spans(samples, sample_rate)
    voiced_s = float((spans_s[:, 1] - spans_s[:, 0]).sum())
    if voiced_s < FRAME_S * len(words):
        spans_s, voiced_s = np.array([[0.0, duration_s]]), duration_s
    weights = np.array([word_length(word) for word in words])
    edges = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()]) * voiced_s
    # Voiced time -> clip time. A word that begins where a pause begins, begins after it.
    lengths = spans_s[:, 1] - spans_s[:, 0]
    offsets = np.concatenate([[0.0], np.cumsum(lengths)])
    last = len(lengths) - 1
    starts_in = np.clip(np.searchsorted(offsets, edges[:-1] + 1e-9, side="right") - 1, 0, last)
    ends_in = np.clip(np.searchsorted(offsets, edges[1:] - 1e-9, side="left") - 1, 0, last)
    starts_s = spans_s[starts_in, 0] + edges[:-1] - offsets[starts_in]
    ends_s = np.minimum(spans_s[ends_in, 0] + edges[1:] - offsets[ends_in], duration_s)
    return [
        {"word": word, "start_s": float(start_s), "end_s": float(end_s)}
        for word, start_s, end_s in zip(words, starts_s, ends_s, strict=True)
    ]


def voiced_spans(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return `[N, 2]` start and end in seconds of the parts that sound, float64, ascending; N may be 0."""
    hop = max(1, round(FRAME_S * sample_rate))
    num_frames = len(samples) // hop
    if num_frames < 3:
        return np.zeros((0, 2))
    frames = samples[: num_frames * hop].reshape(num_frames, hop)
    power = np.einsum("tn,tn->t", frames, frames) / hop + 1e-10
    peak_db = 10 * math.log10(power.max())
    floor_db = 10 * math.log10(np.partition(power, num_frames // 20)[num_frames // 20])
    # A clip without quiet parts has no floor to speak of: never ask for more than 15 dB below its peak.
    threshold_db = min(max(peak_db - _BELOW_PEAK_DB, floor_db + _ABOVE_FLOOR_DB), peak_db - 15.0)
    is_voiced = np.zeros(num_frames + 2, dtype=bool)
    np.greater(power, 10 ** (threshold_db / 10), out=is_voiced[1:-1])
    edges = np.flatnonzero(is_voiced[1:] != is_voiced[:-1])
    spans_s = edges.reshape(-1, 2) * (hop / sample_rate)
    spans_s = _merge(spans_s, _SHORTEST_PAUSE_S)
    is_long = (spans_s[:, 1] - spans_s[:, 0]) >= _SHORTEST_VOICED_S
    if is_long.any():
        spans_s = spans_s[is_long]
    spans_s = spans_s + np.array([-_MARGIN_S, _MARGIN_S])
    return np.clip(spans_s, 0.0, len(samples) / sample_rate)


@functools.lru_cache(maxsize=4096)
def word_length(word: str) -> float:
    """Estimate how long a word lasts, in arbitrary units: its syllables and its letters."""
    letters = sum(character.isalnum() for character in word)
    return 1.0 + max(1, len(_VOWELS.findall(word))) + 0.6 * letters


def _merge(spans_s: np.ndarray, shortest_gap_s: float) -> np.ndarray:
    if len(spans_s) < 2:
        return spans_s
    is_pause = spans_s[1:, 0] - spans_s[:-1, 1] >= shortest_gap_s
    starts_s = spans_s[np.concatenate([[True], is_pause]), 0]
    ends_s = spans_s[np.concatenate([is_pause, [True]]), 1]
    return np.stack([starts_s, ends_s], axis=1)


class CtcAligner:
    """Forced alignment with a wav2vec2 CTC model: the best path of the transcript's characters through its frames.

    Args:
        model_name_or_folder: a Hub id such as `facebook/wav2vec2-base-960h`, or a local folder.
        device: where the model runs.

    Raises:
        UserError: no CTC model of that name can be loaded.
    """

    def __init__(self, model_name_or_folder: str, device: str = "cpu"):
        # torch and transformers take seconds to import and must stay out of the energy path, whose workers are forked.
        import torch
        from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

        try:
            self._model: Any = Wav2Vec2ForCTC.from_pretrained(model_name_or_folder).to(device).eval()
            self._extractor = Wav2Vec2FeatureExtractor.from_pretrained(model_name_or_folder)
            tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(model_name_or_folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{model_name_or_folder}: no wav2vec2 CTC model can be loaded ({str(error).splitlines()[0]}).",
                "Name a Hub model or a folder with config.json, weights, vocab.json and preprocessor_config.json.",
            ) from error
        self._torch = torch
        self._device = device
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._blank_id: int = tokenizer.pad_token_id
        self._delimiter_id: int | None = self._vocabulary.get(tokenizer.word_delimiter_token)
        self._is_upper = any(len(token) == 1 and token.isupper() for token in self._vocabulary)

    def align(
        self, clips: list[np.ndarray], sample_rate: int, words: list[list[str]]
    ) -> list[list[dict[str, Any]] | None]:
        """Return each clip's words with their times, `None` if the model cannot spell them or the clip is too short.

        Args:
            clips: float32 `[S]` each.
            sample_rate: of the clips.
            words: of each clip.
        """
        return [self._align_one(clip, sample_rate, of_clip) for clip, of_clip in zip(clips, words, strict=True)]

    def _align_one(self, samples: np.ndarray, sample_rate: int, words: list[str]) -> list[dict[str, Any]] | None:
        import soxr
        from torchaudio.functional import forced_align, merge_tokens

        spelling = [self._spell(word) for word in words]
        if not all(spelling):
            return None
        target: list[int] = []
        for word_index, ids in enumerate(spelling):
            if word_index and self._delimiter_id is not None:
                target.append(self._delimiter_id)
            target.extend(ids)
        rate = self._extractor.sampling_rate
        inputs = self._extractor(soxr.resample(samples, sample_rate, rate), sampling_rate=rate, return_tensors="pt")
        with self._torch.inference_mode():
            logits = self._model(inputs.input_values.to(self._device)).logits
            log_probs = logits.float().log_softmax(-1).cpu()
        num_frames = log_probs.shape[1]
        num_repeats = sum(a == b for a, b in zip(target, target[1:], strict=False))
        if num_frames < len(target) + num_repeats:
            return None
        targets = self._torch.tensor([target], dtype=self._torch.int32)
        with warnings.catch_warnings():  # torchaudio 2.9 announces the end of `forced_align`, which stayed
            warnings.simplefilter("ignore", UserWarning)
            path, scores = forced_align(log_probs, targets, blank=self._blank_id)
        spans = merge_tokens(path[0], scores[0], blank=self._blank_id)
        assert len(spans) == len(target), (len(spans), len(target))
        frame_s = len(samples) / sample_rate / num_frames
        aligned, position = [], 0
        for word, ids in zip(words, spelling, strict=True):
            first, last = spans[position], spans[position + len(ids) - 1]
            aligned.append({"word": word, "start_s": first.start * frame_s, "end_s": last.end * frame_s})
            position += len(ids) + (self._delimiter_id is not None)
        return aligned

    def _spell(self, word: str) -> list[int]:
        """Return the ids of the word's characters, empty if the vocabulary lacks one. Punctuation is not spoken."""
        spoken = [character for character in word if character.isalnum() or character == "'"]
        folded = "".join(spoken).upper() if self._is_upper else "".join(spoken).lower()
        ids = [self._vocabulary.get(character) for character in folded]
        if None in ids and "'" not in self._vocabulary:
            ids = [self._vocabulary.get(character) for character in folded.replace("'", "")]
        return [] if None in ids else [id_ for id_ in ids if id_ is not None]


@functools.lru_cache(maxsize=1)
def load_ctc_aligner(model_name_or_folder: str, device: str | None = None) -> CtcAligner:
    """Load a CTC aligner once per process, on the GPU if there is one."""
    import torch

    return CtcAligner(model_name_or_folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))
