"""Words in Moshi's text stream: force given words, and read the words of a generated stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import sentencepiece

from hf_csm.units import frames_to_seconds, seconds_to_frames


WORD_START = "\u2581"
"""First character of a SentencePiece token that begins a word."""
MAX_PADDING_S = 0.96
"""Maximum pause between two forced words, so that every text ends."""


class Script:
    """Replaces the sampled text tokens of a slot by given words: Moshi decides when a word begins, the script which.

    The stream has the layout of `layout.text_stream` in training: the tokens of a word in consecutive frames, the end
    of padding before it, padding elsewhere. A word begins where Moshi samples the end of padding or a token that
    begins a word.

    Attributes:
        word_frames: first frame of each word that has begun.
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
            num_given: frames at the start that stay unchanged: the prefix.
            word_starts: tokens that begin a word.
            max_padding: consecutive frames of padding after which the next word begins whatever Moshi samples.
        """
        assert words and all(words), words
        self.word_frames: list[int] = []
        self.last_frame: int | None = None
        self._words, self._tokens = deque(words), deque[int]()
        self._num_given, self._word_starts = num_given, frozenset(word_starts)
        self._padding_id, self._end_of_padding_id, self._max_padding = padding_id, end_of_padding_id, max_padding
        self._num_frames = self._num_padding = 0
        self._is_announced = self._follows_word = False

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


def script_of(words: Sequence[str], tokenizer: sentencepiece.SentencePieceProcessor, **options: Any) -> Script:
    """Return the `Script` of some words, with its other options."""
    starts = [token for token in range(tokenizer.vocab_size()) if tokenizer.id_to_piece(token).startswith(WORD_START)]
    return Script([tokens for tokens in map(tokenizer.encode, words) if tokens], word_starts=starts, **options)


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
            words[-1]["word"] += f" {word}"  # punctuation between spaces, as in `split_words`
        elif word:
            words.append({"word": word, "start_s": frames_to_seconds(frame)})
    return words
