"""Transcripts: one spelling of white space and Unicode for all corpora, and what counts as a word."""

from __future__ import annotations

import re
import unicodedata

from hf_csm.errors import UserError


_INVISIBLE = re.compile("[\ufeff\u200b-\u200f\u2060\x00-\x08\x0e-\x1f\x7f]")
# Scripts without spaces: one character is one word.
_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff"
_WORD = re.compile(rf"[{_CJK}][^\w\s]*|[^\s{_CJK}]+")


def normalise_text(text: str, where: str) -> str:
    """Return the transcript in Unicode NFC with single spaces and no invisible characters.

    Case and punctuation stay: the text stream of a conversational model carries both.

    Raises:
        UserError: nothing that can be spoken is left. `where` names the clip.
    """
    normalised = " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())
    if not any(character.isalnum() for character in normalised):
        raise UserError(f"{where}: the transcript {text!r} is empty.", "Give the clip its transcript or remove it.")
    return normalised


def split_words(text: str) -> list[str]:
    """Split a normalised transcript in words, punctuation left on them; a mark that stands alone joins its neighbour.

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
