"""Word times from Praat TextGrids, as written by forced aligners, and their match with transcripts."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from hf_csm.errors import UserError


TimedWord = tuple[str, float, float]
"""A word, and its start and end in seconds."""

SILENCES = frozenset(("", "sil", "sp", "spn", "<eps>"))
UNKNOWN_WORD = "<unk>"
"""Label that aligners write for out-of-vocabulary words."""

_ROUNDING_S = 0.001
_WORD_TIER = re.compile(r"(?:.* - )?words?", re.IGNORECASE)  # aligners may prefix the speaker: "p12 - words"
_TOKEN = re.compile(r'"(?:[^"]|"")*"|(?<!\S)[-+]?\.?\d[^\s"]*|<exists>')


def read_words(content: bytes, where: str) -> tuple[TimedWord, ...]:
    """Return the words of a TextGrid in order, without silences.

    The words are those of the interval tier called `words` or `word`, else of the first interval tier.

    Args:
        content: the file, in Praat's long or short text format, UTF-8 or UTF-16.
        where: name in messages.

    Raises:
        UserError: damaged, truncated, without an interval tier, or with words that end before they start.
    """
    tiers = _interval_tiers(_decode(content, where), where)
    _, intervals = next((tier for tier in tiers if _WORD_TIER.fullmatch(tier[0].strip())), tiers[0])
    last_end_s = 0.0
    for label, start_s, end_s in intervals:
        if not last_end_s - _ROUNDING_S <= start_s <= end_s:
            raise _damaged(where, f"the interval {label!r} from {start_s:g} to {end_s:g} s is out of order")
        last_end_s = end_s
    return tuple(interval for interval in intervals if interval[0].lower() not in SILENCES)


def place_words(words: Iterable[str], aligned: tuple[TimedWord, ...]) -> tuple[TimedWord, ...] | None:
    """Return the words of a transcript with the times of the aligned words; `None` if the words differ.

    Case and punctuation are ignored. A word may be aligned in several pieces, and `<unk>` matches any one word.

    >>> place_words(["Well-known,", "Zyx!"], (("well", 0.1, 0.3), ("known", 0.3, 0.6), ("<unk>", 0.6, 1.0)))
    (('Well-known,', 0.1, 0.6), ('Zyx!', 0.6, 1.0))
    """
    placed = []
    position = 0
    for word in words:
        if position == len(aligned):
            return None
        piece, start_s, end_s = aligned[position]
        position += 1
        letters, spelled = _letters(word), _letters(piece)
        while piece.lower() != UNKNOWN_WORD and spelled != letters:
            if position == len(aligned) or not letters.startswith(spelled):
                return None
            piece, _, end_s = aligned[position]
            position += 1
            spelled += _letters(piece)
        placed.append((word, start_s, end_s))
    return tuple(placed) if position == len(aligned) else None


def _interval_tiers(text: str, where: str) -> list[tuple[str, list[TimedWord]]]:
    """Return name and intervals of each interval tier.

    Praat reads both formats the same way: only quoted strings, free-standing numbers and `<exists>` matter.
    """
    if text.count('"') % 2:
        raise _damaged(where, "a label has no end")
    tokens = _TOKEN.findall(text)
    found = []
    try:
        if tokens[1] != '"TextGrid"' or tokens[4] != "<exists>":
            raise ValueError("not in text format, or without tiers")
        position = 6
        for _ in range(int(tokens[5])):
            kind, name, _, _, num_entries = tokens[position : position + 5]
            num_fields = 3 if kind == '"IntervalTier"' else 2
            position += 5
            entries = tokens[position : position + num_fields * int(num_entries)]
            position += len(entries)
            labels = [_unquoted(label) for label in entries[num_fields - 1 :: num_fields]]
            if len(labels) != int(num_entries):
                raise ValueError(f"{len(labels)} of {num_entries} entries are there")
            if num_fields == 3:
                starts_s, ends_s = map(float, entries[::3]), map(float, entries[1::3])
                found.append((_unquoted(name), list(zip(labels, starts_s, ends_s, strict=True))))
    except IndexError as error:
        raise _damaged(where, "not a TextGrid") from error
    except ValueError as error:
        raise _damaged(where, str(error)) from error
    if position != len(tokens):
        raise _damaged(where, "it goes on after its last tier")
    if not found:
        raise _damaged(where, "no interval tier")
    return found


def _unquoted(token: str) -> str:
    """Return the text of a quoted string; raise `ValueError` if it is not one."""
    if token[0] != '"':
        raise ValueError(f"{token} stands where a label should")
    return token[1:-1].replace('""', '"').strip()


def _decode(content: bytes, where: str) -> str:
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _damaged(where, "neither UTF-8 nor UTF-16") from error


def _damaged(where: str, reason: str) -> UserError:
    return UserError(f"{where}: the TextGrid cannot be read ({reason}).", "Get this file again, or remove it.")


def _letters(word: str) -> str:
    folded = word.casefold()
    return folded if folded.isalnum() else "".join(character for character in folded if character.isalnum())
