"""Moshi's text stream, written and read: words that it is made to say, and the words that it said."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import sentencepiece
import torch

from hf_csm.units import frames_to_seconds, seconds_to_frames


WORD_START = "\u2581"
"""What SentencePiece begins a word with."""
MAX_PADDING_S = 0.96
"""Longest pause between two words of a text, whatever Moshi thinks: so every text comes to its end."""


class Script:
    """A text policy of `Engine` that makes Moshi say given words: Moshi decides when one begins, the script which.

    The stream is what `data.layout.text_stream` lays out in training: the tokens of a word in a row, the end of
    padding before it, padding elsewhere. A word begins where Moshi samples the end of padding or what begins a word.

    Attributes:
        word_frames: frame in which each word began, of those that have.
        last_frame: frame of the last token of the last word; None until then.
    """

    def __init__(
        self,
        words: Sequence[Sequence[int]],
        *,
        num_given: int,
        word_starts: Collection[int],
        padding_id: int,
        end_of_padding_id: int,
        max_padding: int = seconds_to_frames(MAX_PADDING_S),
    ):
        """Begin with the first word.

        Args:
            words: tokens of each.
            num_given: frames at the start that are left as they are: the prefix.
            word_starts: tokens that begin a word.
            max_padding: frames of padding in a row after which the next word begins whatever Moshi samples.
        """
        assert words and all(words), words
        self.word_frames: list[int] = []
        self.last_frame: int | None = None
        self._words, self._tokens = deque(words), deque[int]()
        self._num_given, self._word_starts = num_given, frozenset(word_starts)
        self._padding_id, self._end_of_padding_id, self._max_padding = padding_id, end_of_padding_id, max_padding
        self._num_frames = self._num_padding = 0
        self._is_announced = self._follows_word = False

    def __call__(self, text_tokens: torch.Tensor) -> None:
        """Write over what was sampled for the only slot, `[1]`."""
        text_tokens[0] = self.follow(int(text_tokens[0]))

    def follow(self, sampled: int) -> int:
        """Return the text token of the next frame."""
        frame, self._num_frames = self._num_frames, self._num_frames + 1
        if frame < self._num_given:
            return sampled
        if self._words and not self._tokens:
            begins_word = sampled in self._word_starts
            if self._is_announced or (begins_word and self._follows_word):
                self._tokens.extend(self._words.popleft())
                self.word_frames.append(frame)
                self._is_announced = False
            elif begins_word or sampled == self._end_of_padding_id or self._num_padding >= self._max_padding:
                self._is_announced, self._follows_word, self._num_padding = True, False, 0
                return self._end_of_padding_id
        self._follows_word = bool(self._tokens)
        if not self._tokens:
            self._num_padding += 1
            return self._padding_id
        token = self._tokens.popleft()
        if not self._tokens and not self._words:
            self.last_frame = frame
        return token


def words_in(
    text_tokens: Sequence[int], tokenizer: sentencepiece.SentencePieceProcessor, padding_ids: Collection[int]
) -> list[dict[str, Any]]:
    """Return the words of a text stream with the time at which each begins, in seconds from its first frame."""
    parts: list[tuple[int, list[int]]] = []
    for frame, token in enumerate(text_tokens):
        if token in padding_ids:
            continue
        if not parts or tokenizer.id_to_piece(token).startswith(WORD_START):
            parts.append((frame, []))
        parts[-1][1].append(token)
    words: list[dict[str, Any]] = []
    for frame, tokens in parts:
        word = tokenizer.decode(tokens).strip()
        if words and word and not any(character.isalnum() for character in word):
            words[-1]["word"] += f" {word}"  # a mark that stands alone, as in `split_words`
        elif word:
            words.append({"word": word, "start_s": frames_to_seconds(frame)})
    return words
