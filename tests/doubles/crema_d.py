"""CREMA-D with synthetic clips: its file names, tables, layouts and defects, at any size.

    from tests.doubles.crema_d import write_crema_d
    write_crema_d("raw", actors=(1001, 1010, 1015), sentences=("IEO",))      # raw/AudioWAV/1001_IEO_NEU_XX.wav

The whole grid is 7,442 files of about 70 KB.
"""

from __future__ import annotations

import csv
import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_csm.testing.synthesizer import synthesize


Layout = Literal["clone", "mirror", "flat", "bare", "audb"]

SENTENCES = ("IEO", "TIE", "IOM", "IWW", "TAI", "MTI", "IWL", "ITH", "DFA", "ITS", "TSI", "WSI")
EMOTIONS = ("NEU", "HAP", "SAD", "ANG", "FEA", "DIS")
MISSING = ("1002_TIE_NEU", "1008_WSI", "1009_MTI", "1019_ITH", "1076_ITS_NEU")
"""Beginnings of names that the corpus does not have."""
SILENT, MISNAMED = "1076_MTI_SAD_XX", "1040_ITH_SAD_XX"
KNOWN_VOTES = {"1001_IEO_NEU_XX": (0, 0, 0, 1, 10, 0), "1001_IEO_ANG_MD": (5, 5, 0, 0, 1, 1)}
"""Voice votes of the corpus itself on A, D, F, H, N, S; the second is a tie."""
_STYLES = {"NEU": "neutral", "HAP": "happy", "SAD": "sad", "ANG": "angry", "FEA": "fearful", "DIS": "disgust"}
_INTENSITIES = {"LO": "low", "HI": "high"}
_SAMPLE_RATE = 16_000


def write_crema_d(
    folder: str | Path,
    *,
    actors: Iterable[int] = range(1001, 1092),
    sentences: Sequence[str] = SENTENCES,
    emotions: Sequence[str] = EMOTIONS,
    layout: Layout = "clone",
    defects: bool = True,
) -> Path:
    """Write a part of the grid and return `folder`.

    Args:
        folder: is made.
        actors: 1001 to 1091.
        sentences: codes, as in `SENTENCES`.
        emotions: codes, as in `EMOTIONS`.
        layout: `clone` (the Git repository, where the MP3s are LFS pointers), `mirror` (the same without votes),
            `flat` (`AudioWAV/` alone), `bare` (no folder) or `audb` (a folder for each actor).
        defects: the silent clip and the misnamed clip, where they are in the part.
    """
    folder = Path(folder)
    names = list(clip_names(actors, sentences, emotions))
    for name in names:
        parent = {"bare": "", "audb": name[:4]}.get(layout, "AudioWAV")
        file_name = MISNAMED[:-1] if defects and name == MISNAMED else name
        content = clip_bytes(name, is_silent=defects and name == SILENT)
        _write(folder / parent / f"{file_name}.wav", content)
        if layout in ("clone", "mirror"):
            _write(folder / f"AudioMP3/{name}.mp3", lfs_pointer(content))
    if layout in ("clone", "mirror"):
        _write(folder / "VideoDemographics.csv", demographics_csv())
    if layout == "clone":
        _write(folder / "processedResults/summaryTable.csv", summary_csv(names))
        _write(folder / "processedResults/tabulatedVotes.csv", votes_csv(names))
    return folder


def clip_names(
    actors: Iterable[int] = range(1001, 1092),
    sentences: Sequence[str] = SENTENCES,
    emotions: Sequence[str] = EMOTIONS,
) -> Iterator[str]:
    """Yield the names, without `.wav`, of a part of the grid."""
    for actor in actors:
        for sentence in sentences:
            for emotion in emotions:
                for level in ("LO", "MD", "HI") if sentence == "IEO" and emotion != "NEU" else ("XX",):
                    name = f"{actor}_{sentence}_{emotion}_{level}"
                    if not name.startswith(MISSING):
                        yield name


def clip_bytes(name: str, *, is_silent: bool = False) -> bytes:
    """Return the wav of a clip: 16 kHz, 16 bit, mono. In some, as in the corpus, the header is two bytes longer."""
    actor, _, emotion, level = name.split("_")
    samples, _ = synthesize(
        "Maybe it will be cold",
        speaker=int(actor),
        emotion=_STYLES[emotion],
        intensity=_INTENSITIES.get(level, "medium"),
        sample_rate=_SAMPLE_RATE,
        seed=zlib.crc32(name.encode()),
        lead_s=(0.2, 0.4),
        tail_s=(0.2, 0.4),
    )
    data = np.rint(samples * (0 if is_silent else 32767)).astype("<i2").tobytes()
    fmt = struct.pack("<HHIIHH", 1, 1, _SAMPLE_RATE, 2 * _SAMPLE_RATE, 2, 16) + bytes(2 if level == "HI" else 0)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lfs_pointer(content: bytes) -> bytes:
    """Return the text that a clone without Git LFS has instead of a file."""
    sha256 = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()


def demographics_csv() -> bytes:
    """Return VideoDemographics.csv with made-up ages, and with the sex of a few actors as in the corpus."""
    rows: list[list[Any]] = [["ActorID", "Age", "Sex", "Race", "Ethnicity"]]
    for actor in range(1001, 1092):
        sex = "Male" if actor in (1001, 1015, 1040) else "Female"
        rows.append([actor, 20 + actor % 55, sex, "Unknown", "Not Hispanic"])
    return _csv(rows)


def vote_counts(name: str, kind: str = "Voice") -> dict[str, int]:
    """Return how many raters chose each emotion for a clip, by voice, face or both."""
    acted = name.split("_")[2][0]
    made_up = {"Voice": {"N": 3, acted: 5}, "Face": {"N": 1, "H": 8}, "MultiModal": {"H": 2, acted: 7}}[kind]
    counts = dict(zip("ADFHNS", KNOWN_VOTES.get(name, ()), strict=False)) if kind == "Voice" else {}
    return counts or {letter: made_up.get(letter, 0) for letter in "ADFHNS"}


def summary_csv(names: Iterable[str]) -> bytes:
    """Return summaryTable.csv: the most frequent vote and its level for each clip; colons separate ties."""
    rows: list[list[Any]] = [["", "FileName", "VoiceVote", "VoiceLevel", "FaceVote", "FaceLevel"]]
    for number, name in enumerate(names, start=1):
        voice, face = _winners(vote_counts(name)), _winners(vote_counts(name, "Face"))
        rows.append([str(number), name, voice, ":".join("60.5" for _ in voice.split(":")), face, "72.25"])
    return _csv(rows)


def votes_csv(names: Iterable[str]) -> bytes:
    """Return tabulatedVotes.csv: how many raters chose each emotion, by voice alone, face alone and both."""
    rows: list[list[Any]] = [["", *"ADFHNS", "fileName", "numResponses", "agreement", "emoVote"]]
    names = list(names)
    for modality, kind in enumerate(("Voice", "Face", "MultiModal"), start=1):
        for number, name in enumerate(names, start=1):
            counts = vote_counts(name, kind)
            num_votes = sum(counts.values())
            facts = [name, num_votes, max(counts.values()) / num_votes, _winners(counts)]
            rows.append([str(100_000 * modality + number), *counts.values(), *facts])
    return _csv(rows)


def _winners(counts: dict[str, int]) -> str:
    return ":".join(letter for letter in counts if counts[letter] == max(counts.values()))


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a table as R writes it: strings quoted, numbers bare."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("ascii")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
