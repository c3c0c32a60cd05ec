"""Word times in Praat TextGrids, as forced aligners leave them beside a corpus, and how they fit its transcripts."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Any

from praatio.utilities.constants import INTERVAL_TIER
from praatio.utilities.errors import PraatioException
from praatio.utilities.textgrid_io import parseTextgridStr

from hf_csm.errors import UserError


TimedWord = tuple[str, float, float]
"""A word, and its start and end in seconds."""

SILENCES = frozenset(("", "sil", "sp", "spn", "<eps>"))
UNKNOWN_WORD = "<unk>"
"""What aligners write for a word that their dictionary lacks."""

_ROUNDING_S = 0.001
_WORD_TIER = re.compile(r"(?:.* - )?words?", re.IGNORECASE)  # aligners put the speaker before it: "p12 - words"
# What the long and the short format share once the names of the long one's fields are optional.
_NUM_TIERS = re.compile(r"<exists>\s*(?:size\s*=\s*)?(\d+)")
_NUM_INTERVALS = re.compile(
    r'"IntervalTier"\s*(?:name\s*=\s*)?"(?:[^"]|"")*"'
    r"\s*(?:xmin\s*=\s*)?[-+.\de]+\s*(?:xmax\s*=\s*)?[-+.\de]+\s*(?:intervals:\s*size\s*=\s*)?(\d+)"
)


def read_words(content: bytes, where: str) -> tuple[TimedWord, ...]:
    """Return the words of a TextGrid in order; silences are passed over.

    The words are those of the interval tier called `words` or `word`, else of the first interval tier.

    Args:
        content: the file, in Praat's long or short text format, UTF-8 or UTF-16.
        where: what to call it in a message.

    Raises:
        UserError: damaged, cut short, without an interval tier, or with words that end before they start.
    """
    tiers = _interval_tiers(_decode(content, where), where)
    tier = next((tier for tier in tiers if _WORD_TIER.fullmatch(tier["name"].strip())), tiers[0])
    words = []
    last_end_s = 0.0
    for start, end, label in tier["entries"]:
        start_s, end_s = _seconds(start, where), _seconds(end, where)
        if not last_end_s - _ROUNDING_S <= start_s <= end_s:
            raise _damaged(where, f"the interval {label!r} from {start} to {end} s is out of order")
        last_end_s = end_s
        if label.lower() not in SILENCES:
            words.append((label, start_s, end_s))
    return tuple(words)


def place_words(words: Iterable[str], heard: tuple[TimedWord, ...]) -> tuple[TimedWord, ...] | None:
    """Return the words of a transcript with the times at which an aligner heard them; `None` if they differ.

    Case and punctuation do not count. A word may have been heard in pieces, and `<unk>` stands for any one word.

    >>> place_words(["Well-known,", "Zyx!"], (("well", 0.1, 0.3), ("known", 0.3, 0.6), ("<unk>", 0.6, 1.0)))
    (('Well-known,', 0.1, 0.6), ('Zyx!', 0.6, 1.0))
    """
    placed = []
    position = 0
    for word in words:
        if position == len(heard):
            return None
        piece, start_s, end_s = heard[position]
        position += 1
        letters, spelled = _letters(word), _letters(piece)
        while piece.lower() != UNKNOWN_WORD and spelled != letters:
            if position == len(heard) or not letters.startswith(spelled):
                return None
            piece, _, end_s = heard[position]
            position += 1
            spelled += _letters(piece)
        placed.append((word, start_s, end_s))
    return tuple(placed) if position == len(heard) else None


def _interval_tiers(text: str, where: str) -> list[dict[str, Any]]:
    try:
        tiers = parseTextgridStr(text + "\n", includeEmptyIntervals=True)["tiers"]
    except (PraatioException, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise _damaged(where, "not a TextGrid in text format") from error
    found = [tier for tier in tiers if tier["class"] == INTERVAL_TIER]
    # The parser takes what is left of a file that was cut short for the whole of it.
    if text.count('"') % 2:
        raise _damaged(where, "a label has no end")
    num_tiers = _NUM_TIERS.search(text)
    if num_tiers is None or int(num_tiers[1]) != len(tiers):
        raise _damaged(where, f"{len(tiers)} of {num_tiers[1] if num_tiers else 'unknown'} tiers are there")
    declared = [int(match[1]) for match in _NUM_INTERVALS.finditer(text)]
    if declared != [len(tier["entries"]) for tier in found]:
        raise _damaged(where, "intervals are missing")
    if not found:
        raise _damaged(where, "no interval tier")
    return found


def _decode(content: bytes, where: str) -> str:
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _damaged(where, "neither UTF-8 nor UTF-16") from error


def _seconds(number: str, where: str) -> float:
    try:
        return float(number)
    except ValueError as error:
        raise _damaged(where, f"{number!r} is not a time") from error


def _damaged(where: str, reason: str) -> UserError:
    return UserError(f"{where}: the TextGrid cannot be read ({reason}).", "Get this file again, or remove it.")


def _letters(word: str) -> str:
    return "".join(character for character in word.casefold() if character.isalnum())
