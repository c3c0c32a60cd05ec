"""What a manifest of dialogues says, and the words beside its recordings: read and checked line by line."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hf_csm.data.labels import EMOTIONS
from hf_csm.errors import UserError
from hf_csm.units import Seconds


Alignment = tuple[str, Seconds, Seconds, str]
"""Word, start, end, speaker."""


def read_rows(manifest: Path) -> list[tuple[str, str, Seconds | None, str | None, str | None]]:
    """Return where it is said, path, duration, emotion and language of each row.

    Raises:
        UserError: the manifest is missing, or a row is damaged or names what it must not.
    """
    remedy = 'Each line is an object such as {"path": "data_stereo/a.wav", "duration": 24.5}.'
    try:
        lines = manifest.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not UTF-8 text"
        raise UserError(f"{manifest}: no manifest that can be read: {reason}.", "Name its .jsonl file.") from error
    rows = []
    lines_of: dict[Path, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{manifest}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error}.", remedy) from error
        path = row.get("path") if isinstance(row, dict) else None
        if not isinstance(path, str) or not Path(path).name:
            raise UserError(f"{where}: no path.", remedy)
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(
                f"{where}: {path} is not inside the manifest's folder.", "Give paths that start from that folder."
            )
        first = lines_of.setdefault(Path(path).with_suffix(""), number)
        if first != number:
            raise UserError(f"{where}: {path} was named in line {first} already.", "Name each recording once.")
        duration_s, emotion, language = row.get("duration"), row.get("emotion"), row.get("language")
        if duration_s is not None and not (_is_number(duration_s) and duration_s > 0):
            raise UserError(f"{where}: the duration of {path} is {duration_s!r}.", "Give its seconds, or nothing.")
        if emotion is not None and emotion not in EMOTIONS:
            raise UserError(f"{where}: unknown emotion {emotion!r}.", f"Choose from {', '.join(EMOTIONS)}, or none.")
        if language is not None and not (isinstance(language, str) and language.strip()):
            raise UserError(f"{where}: the language of {path} is {language!r}.", "Give a code such as en, or nothing.")
        rows.append((where, path, duration_s, emotion, language and language.strip().lower()))
    if not rows:
        raise UserError(f"{manifest}: empty.", remedy)
    return rows


def read_alignments(audio: Path) -> list[Alignment]:
    """Read the words beside an audio file, by time.

    Raises:
        UserError: they are missing or damaged.
    """
    path = audio.with_suffix(".json")
    remedy = 'It has {"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}; annotate the audio again.'
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["alignments"]
    except OSError as error:
        raise UserError(f"{path}: no alignments of {audio.name}: {error.strerror}.", remedy) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged alignments: no JSON object with a list of them.", remedy) from error
    words = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        match entry:
            case [str(word), [start_s, end_s], str(speaker)] if _is_number(start_s) and _is_number(end_s):
                words.append((word.strip(), float(start_s), float(end_s), speaker))
            case _:
                raise UserError(f"{path}: damaged alignments: entry {number} is {str(entry)[:60]!r}.", remedy)
    return sorted((word for word in words if word[0]), key=lambda word: word[1:3])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
