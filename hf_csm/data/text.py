"""Transcripts: white space and Unicode normalization for all corpora, and splitting into words."""

from __future__ import annotations

import re
import unicodedata

from hf_csm.errors import UserError


_INVISIBLE = re.compile("[\ufeff\u200b-\u200f\u2060\x00-\x08\x0e-\x1f\x7f]")
# Scripts without spaces: one character is one word.
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
_WORD = re.compile(rf"[{_CJK}][^\w\s]*|[^\s{_CJK}]+")


def normalize_text(text: str, where: str) -> str:
    """Return the transcript in Unicode NFC with single spaces and no invisible characters.

    Case and punctuation are kept: the text stream of a conversational model has both.

    Raises:
        UserError: no letter or digit is left. `where` names the clip in the message.
    """
    normalized = " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())
    if not any(character.isalnum() for character in normalized):
        raise UserError(f"{where}: the transcript {text!r} is empty.", "Give the clip its transcript or remove it.")
    return normalized


def split_words(text: str) -> list[str]:
    """Split a normalized transcript into words with their punctuation; a mark on its own joins its neighbor.

    >>> split_words("Dogs are - oh! - by the door.")
    ['Dogs', 'are -', 'oh! -', 'by', 'the', 'door.']
    """
    words: list[str] = []
    opening = ""
    for match in _WORD.finditer(text):
        token = match.group()
        space = " " if text[match.start() - 1 : match.start()] == " " else ""
        if any(character.isalnum() for character in token):
            words.append(f"{opening}{space}{token}" if opening else token)
            opening = ""
        elif words:
            words[-1] += space + token
        else:
            opening += (space if opening else "") + token
    return words
