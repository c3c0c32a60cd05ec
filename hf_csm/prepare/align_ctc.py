"""Word times by forced alignment with a CTC speech recognizer."""

from __future__ import annotations

import functools
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import soxr

from hf_csm.data.text import split_words
from hf_csm.errors import UserError
from hf_csm.prepare.align_energy import voiced_spans


_BATCH_S = 160.0
"""Seconds of audio in a transformer batch, including padding: 1 GB for a model of 24 layers."""
_FARTHEST_S = 0.5
"""Maximum extension of a word beyond its recognized letters; sound beyond it is not speech."""
_APOSTROPHES = str.maketrans("\u2018\u2019\u02bc", "'''")


class CtcAligner:
    """Forced alignment with a wav2vec2 CTC model, float32. Results do not depend on how clips are batched.

    The convolutions run clip by clip, the transformer on padded features with a mask: models with a group norm in
    their convolutions compute statistics over time, so padded audio would change every frame. For models with a layer
    norm the result equals that of padded audio.

    Args:
        model_name_or_folder: a Hub id such as `facebook/wav2vec2-base-960h`, or a local folder.
        device: where the model runs.

    Raises:
        UserError: no CTC model can be loaded, or it lacks its head or its blank token.
    """

    def __init__(self, model_name_or_folder: str, device: str = "cpu"):
        # Imported here: they take seconds, and the forked workers of the energy path must not import torch.
        import torch
        from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

        remedy = "Name a Hub model or a folder with config.json, weights, vocab.json and preprocessor_config.json."
        try:
            model, loading = Wav2Vec2ForCTC.from_pretrained(
                model_name_or_folder, dtype=torch.float32, output_loading_info=True
            )
            self._extractor: Any = Wav2Vec2FeatureExtractor.from_pretrained(model_name_or_folder)
            tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(model_name_or_folder)
            num_outputs = model.config.vocab_size
            self._vocabulary = {token: id_ for token, id_ in tokenizer.get_vocab().items() if id_ < num_outputs}
        except Exception as error:  # depends on the damage: TypeError, SafetensorError, AttributeError, ...
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{model_name_or_folder}: no wav2vec2 CTC model can be loaded ({reason}).", remedy
            ) from error
        # transformers only warns when it initializes missing weights at random: for a model without CTC head, or of
        # another architecture. `masked_spec_embed` is used in training only.
        missing = sorted(key for key in loading["missing_keys"] if "masked_spec_embed" not in key)
        if missing:
            raise UserError(
                f"{model_name_or_folder}: not a whole wav2vec2 CTC model: it lacks {missing[0]}.",
                "Name a model that was fine-tuned for speech recognition with CTC.",
            )
        if tokenizer.pad_token_id is None or not 0 <= tokenizer.pad_token_id < num_outputs:
            raise UserError(
                f"{model_name_or_folder}: its blank {tokenizer.pad_token!r} is no output of the model.",
                "Save the tokenizer with the pad_token that the model was trained with beside the model.",
            )
        self._torch = torch
        self._device = device
        self._model: Any = model.to(device).eval()
        self._blank_id: int = tokenizer.pad_token_id
        self._delimiter_id = self._vocabulary.get(tokenizer.word_delimiter_token)

    def align(
        self, clips: list[np.ndarray], sample_rate: int, words: list[list[str]]
    ) -> list[list[dict[str, Any]] | None]:
        """Return each clip's words with their times, `None` if the model cannot spell them or the clip is too short.

        Args:
            clips: float32 `[S]` each.
            sample_rate: of the clips.
            words: of each clip, from `split_words`, at least one.

        Returns:
            for each clip `{"word", "start_s", "end_s"}` for each word: ascending, not overlapping, inside the clip.
        """
        rate = self._extractor.sampling_rate
        targets: dict[int, list[list[int]]] = {}
        sounds: dict[int, np.ndarray] = {}
        for index, (clip, of_clip) in enumerate(zip(clips, words, strict=True)):
            assert of_clip, index
            spelling = self._spell_all(of_clip)
            if spelling is None:
                continue
            sound = soxr.resample(clip, sample_rate, rate)
            if self._num_frames(sound) >= _least_frames(sum(spelling, [])):
                targets[index], sounds[index] = spelling, sound
        aligned: list[list[dict[str, Any]] | None] = [None] * len(clips)
        for batch in _batches({index: len(sound) / rate for index, sound in sounds.items()}):
            for index, log_probs in zip(batch, self._log_probs([sounds[index] for index in batch]), strict=True):
                duration_s = len(clips[index]) / sample_rate
                spikes_s = self._spikes(log_probs, targets[index], duration_s)
                spans_s = fill_gaps(spikes_s, voiced_spans(clips[index], sample_rate), duration_s)
                aligned[index] = [
                    {"word": word, "start_s": start_s, "end_s": end_s}
                    for word, (start_s, end_s) in zip(words[index], spans_s, strict=True)
                ]
        return aligned

    def _log_probs(self, sounds: list[np.ndarray]) -> Iterator[Any]:
        """Yield `[1, T, V]` for each sound at the model's rate, on the CPU."""
        torch, model = self._torch, self._model
        rate = self._extractor.sampling_rate
        with torch.inference_mode():
            features = []
            for sound in sounds:
                values = self._extractor(sound, sampling_rate=rate, return_tensors="pt").input_values
                extracted = model.wav2vec2.feature_extractor(values.to(self._device)).transpose(1, 2)
                features.append(model.wav2vec2.feature_projection(extracted)[0][0])
            padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
            num_frames = torch.tensor([len(feature) for feature in features], device=self._device)
            mask = torch.arange(padded.shape[1], device=self._device) < num_frames[:, None]
            hidden = model.wav2vec2.encoder(padded, attention_mask=mask).last_hidden_state
            for row, feature in zip(hidden, features, strict=True):
                own = row[None, : len(feature)]
                if model.wav2vec2.adapter is not None:  # convolutions again: not over padding
                    own = model.wav2vec2.adapter(own)
                yield model.lm_head(own).log_softmax(-1).cpu()

    def _spikes(self, log_probs: Any, spelling: list[list[int]], duration_s: float) -> list[tuple[float, float]]:
        """Return the span of each word's recognized letters: start of the first, end of the last."""
        from torchaudio.functional import forced_align, merge_tokens

        target = sum(spelling, [])
        with warnings.catch_warnings():  # torchaudio 2.9 announces the end of `forced_align`, which stayed
            warnings.simplefilter("ignore", UserWarning)
            # One clip a call: its kernels take a batch of one.
            path, scores = forced_align(
                log_probs, self._torch.tensor([target], dtype=self._torch.int32), blank=self._blank_id
            )
        spans = merge_tokens(path[0], scores[0], blank=self._blank_id)
        assert len(spans) == len(target), (len(spans), len(target))
        frame_s = duration_s / log_probs.shape[1]
        found, position = [], 0
        for ids in spelling:
            letters = [span for span in spans[position : position + len(ids)] if span.token != self._delimiter_id]
            found.append((letters[0].start * frame_s, letters[-1].end * frame_s))
            position += len(ids)
        return found

    def _num_frames(self, sound: np.ndarray) -> int:
        return int(self._model._get_feat_extract_output_lengths(self._torch.tensor(len(sound))))

    def _spell_all(self, words: list[str]) -> list[list[int]] | None:
        """Return the ids of each word, the delimiter before it included; `None` if one word cannot be spelt."""
        spelling: list[list[int]] = []
        for index, word in enumerate(words):
            ids = self._spell(word)
            if not ids:
                return None
            # Scripts without spaces have no delimiter, even if the vocabulary has one.
            is_delimited = index > 0 and split_words(words[index - 1] + word) != [words[index - 1], word]
            has_delimiter = is_delimited and self._delimiter_id is not None
            spelling.append([self._delimiter_id, *ids] if has_delimiter else ids)  # type: ignore[list-item]
        return spelling

    def _spell(self, word: str) -> list[int]:
        """Return the ids of a word's characters in the case of the vocabulary; empty if one is missing.

        Punctuation is ignored; an apostrophe is ignored if the vocabulary has none.
        """
        ids: list[int] = []
        for character in word.translate(_APOSTROPHES):
            if not (character.isalnum() or character == "'" or unicodedata.category(character).startswith("M")):
                continue
            for cased in (character, character.upper(), character.lower()):
                if all(single in self._vocabulary for single in cased):
                    ids += [self._vocabulary[single] for single in cased]
                    break
            else:
                if character != "'":
                    return []
        return ids


def fill_gaps(
    spikes_s: list[tuple[float, float]], sound_s: np.ndarray, duration_s: float
) -> list[tuple[float, float]]:
    """Extend words to their borders: CTC marks a letter by a spike somewhere inside it, the rest is blank.

    A word extends to the adjacent pause, or half-way to the next word if there is none.

    Args:
        spikes_s: start and end of each word's recognized letters, ascending.
        sound_s: `[N, 2]`, the voiced parts of the clip.
        duration_s: of the clip.
    """
    pauses_s = np.concatenate([[0.0], sound_s.ravel(), [duration_s]]).reshape(-1, 2)
    last = len(spikes_s)
    starts_s, ends_s = [start_s for start_s, _ in spikes_s], [end_s for _, end_s in spikes_s]
    for gap in range(last + 1):  # before the word of that index
        low_s = ends_s[gap - 1] if gap else 0.0
        high_s = starts_s[gap] if gap < last else duration_s
        middle_s = 0.0 if gap == 0 else duration_s if gap == last else (low_s + high_s) / 2
        quiet_s = [(a, b) for a, b in np.clip(pauses_s, low_s, high_s).tolist() if a < b] or [(middle_s, middle_s)]
        # Before and after all words, the pause next to them: breaths and clicks lie beyond it. Else the longest.
        longest_s = max(quiet_s, key=lambda pause_s: pause_s[1] - pause_s[0])
        left_s, right_s = quiet_s[-1] if gap == 0 else quiet_s[0] if gap == last else longest_s
        if gap:
            ends_s[gap - 1] = min(left_s, low_s + _FARTHEST_S)
        if gap < last:
            starts_s[gap] = max(right_s, high_s - _FARTHEST_S)
    return list(zip(starts_s, ends_s, strict=True))


def _least_frames(target: list[int]) -> int:
    """Return the minimum number of frames for a target: one per token, and a blank between equal tokens."""
    return len(target) + sum(a == b for a, b in zip(target, target[1:], strict=False))


def _batches(durations_s: dict[int, float]) -> list[list[int]]:
    """Batch clips of similar length, shortest first, up to `_BATCH_S` including padding."""
    batches: list[list[int]] = []
    for index in sorted(durations_s, key=lambda index: durations_s[index]):
        if not batches or (len(batches[-1]) + 1) * durations_s[index] > _BATCH_S:
            batches.append([])
        batches[-1].append(index)
    return batches


@functools.lru_cache(maxsize=1)
def load_ctc_aligner(model_name_or_folder: str, device: str | None = None) -> CtcAligner:
    """Load a CTC aligner once per process, on the GPU if there is one."""
    import torch

    return CtcAligner(model_name_or_folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))
