"""A true CREMA-D of synthetic clips: its names, grid, tables, layouts and every known defect, at any size.

    from tests.doubles.crema_d import write_crema_d
    write_crema_d("raw", actors=(1001, 1010, 1015), sentences=("IEO",))      # raw/AudioWAV/1001_IEO_NEU_XX.wav

The whole grid is 7,442 files of about 70 KB.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_csm.testing.synthesizer import synthesize


Layout = Literal["clone", "mirror", "flat", "bare", "audb"]

ACTORS = range(1001, 1092)
SENTENCES = {
    "IEO": "It's eleven o'clock",
    "TIE": "That is exactly what happened",
    "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about",
    "TAI": "The airplane is almost full",
    "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock",
    "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket",
    "ITS": "I think I've seen this before",
    "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes",
}
EMOTIONS = {"NEU": "neutral", "HAP": "happy", "SAD": "sad", "ANG": "angry", "FEA": "fearful", "DIS": "disgust"}
LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": "medium"}
SENTENCE_WITH_LEVELS = "IEO"
MISSING = ("1002_TIE_NEU", "1008_WSI", "1009_MTI", "1019_ITH", "1076_ITS_NEU")
"""Beginnings of names that the corpus does not have."""
SILENT = "1076_MTI_SAD_XX"
COPIES = {
    "1006_TIE_NEU_XX": "1006_TIE_HAP_XX",
    "1013_WSI_SAD_XX": "1013_WSI_DIS_XX",
    "1017_IWW_FEA_XX": "1017_IWW_ANG_XX",
}
"""Clips that hold the recording of another one, of another emotion."""
MISNAMED = "1040_ITH_SAD_XX"
VOTES = "ADFHNS"
_MEN = "01 05 11 14 15 16 17 19 22 23 26 27 31 32 33 34 35 36 38 39 40 41 42 44 45 48 50 51 57 59 62 64 65 66 67 68 69"
_MORE_MEN = "70 71 77 80 81 83 85 86 87 88 90"
MEN = frozenset(1000 + int(number) for number in f"{_MEN} {_MORE_MEN}".split())
# Voice votes of the corpus itself, the second one a tie.
_KNOWN_VOTES = {"1001_IEO_NEU_XX": (0, 0, 0, 1, 10, 0), "1001_IEO_ANG_MD": (5, 5, 0, 0, 1, 1)}
_SHARE_HEARD_AS_ACTED = {"Voice": 0.45, "Face": 0.6, "MultiModal": 0.7}
_SAMPLE_RATE = 16_000
_ONE_LONG_HEADER_IN = 46
_PATHS = {
    "clone": "AudioWAV/{name}.wav",
    "mirror": "AudioWAV/{name}.wav",
    "flat": "AudioWAV/{name}.wav",
    "bare": "{name}.wav",
    "audb": "{actor}/{name}.wav",
}


def write_crema_d(
    folder: str | Path,
    *,
    actors: Iterable[int] = ACTORS,
    sentences: Sequence[str] = tuple(SENTENCES),
    emotions: Sequence[str] = tuple(EMOTIONS),
    layout: Layout = "clone",
    defects: bool = True,
    seed: int = 0,
) -> Path:
    """Write the chosen part of the grid and return `folder`.

    Args:
        folder: is made.
        actors: 1001 to 1091.
        sentences: codes, as in `SENTENCES`.
        emotions: codes, as in `EMOTIONS`.
        layout: `clone` (the Git repository, whose MP3s and videos are left LFS pointers), `mirror` (the same without
            votes), `flat` (`AudioWAV/` alone), `bare` (no folder) or `audb` (a folder for each actor).
        defects: the silent clip, the three recordings under two names, the misnamed clip, as far as they are in the
            chosen part. Ties among the raters are always there.
        seed: of all clips and votes.
    """
    folder = Path(folder)
    names = list(clip_names(actors, sentences, emotions))
    for name in names:
        file_name = MISNAMED[:-1] if defects and name == MISNAMED else name
        content = clip_bytes(name, defects=defects, seed=seed)
        _write(folder / _PATHS[layout].format(name=file_name, actor=name[:4]), content)
        if layout in ("clone", "mirror"):
            _write(folder / f"AudioMP3/{name}.mp3", lfs_pointer(content))
            _write(folder / f"VideoFlash/{name}.flv", lfs_pointer(content))
    if layout in ("clone", "mirror"):
        _write(folder / "README.md", b"CREMA-D of synthetic clips\n")
        _write(folder / "LICENSE.txt", b"Open Database License (ODbL)\n")
        _write(folder / "VideoDemographics.csv", demographics_csv())
        _write(folder / "SentenceFilenames.csv", _sentence_file_names_csv(names))
    if layout == "clone":
        _write(folder / "processedResults/summaryTable.csv", summary_csv(names, seed=seed))
        _write(folder / "processedResults/tabulatedVotes.csv", votes_csv(names, seed=seed))
    return folder


def clip_names(
    actors: Iterable[int] = ACTORS,
    sentences: Sequence[str] = tuple(SENTENCES),
    emotions: Sequence[str] = tuple(EMOTIONS),
) -> Iterator[str]:
    """Yield the names, without `.wav`, of a part of the grid, in the order of the stimuli."""
    for actor in actors:
        for sentence in SENTENCES:
            for emotion in EMOTIONS:
                has_levels = sentence == SENTENCE_WITH_LEVELS and emotion != "NEU"
                for level in ("LO", "MD", "HI") if has_levels else ("XX",):
                    name = f"{actor}_{sentence}_{emotion}_{level}"
                    if sentence in sentences and emotion in emotions and not name.startswith(MISSING):
                        yield name


def clip_bytes(name: str, *, defects: bool = True, seed: int = 0) -> bytes:
    """Return the wav of a clip name: 16 kHz, 16 bit, mono; the header of one in 46 is two bytes longer."""
    actor, sentence, emotion, level = (COPIES.get(name, name) if defects else name).split("_")
    samples, _ = synthesize(
        SENTENCES[sentence],
        speaker=2 * int(actor) + (int(actor) in MEN),
        emotion=EMOTIONS[emotion],
        intensity=LEVELS[level],
        sample_rate=_SAMPLE_RATE,
        seed=zlib.crc32(f"{seed}:{actor}_{sentence}_{emotion}_{level}".encode()),
        lead_s=(0.2, 0.4),
        tail_s=(0.2, 0.4),
    )
    if defects and name == SILENT:
        samples *= 0
    data = np.rint(samples * 32767).astype("<i2").tobytes()
    fmt = struct.pack("<HHIIHH", 1, 1, _SAMPLE_RATE, 2 * _SAMPLE_RATE, 2, 16)
    if zlib.crc32(name.encode()) % _ONE_LONG_HEADER_IN == 0:
        fmt += bytes(2)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lfs_pointer(content: bytes) -> bytes:
    """Return what a clone without Git LFS holds in place of a file."""
    sha256 = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()


def demographics_csv() -> bytes:
    """Return VideoDemographics.csv: age, sex, race and ethnicity of all 91 actors."""
    rows: list[list[Any]] = [["ActorID", "Age", "Sex", "Race", "Ethnicity"]]
    for actor in ACTORS:
        race, ethnicity = ("Unknown", "Hispanic") if actor == 1047 else ("Caucasian", "Not Hispanic")
        rows.append([actor, 20 + actor % 55, "Male" if actor in MEN else "Female", race, ethnicity])
    return _csv(rows)


def summary_csv(names: Iterable[str], *, seed: int = 0) -> bytes:
    """Return summaryTable.csv: the most frequent vote and its level for each clip, colons on a tie, all quoted."""
    rows = [["", "FileName", *(f"{kind}{fact}" for kind in _SHARE_HEARD_AS_ACTED for fact in ("Vote", "Level"))]]
    for name in names:
        row = [str(_stimuli()[name]), name]
        for kind in _SHARE_HEARD_AS_ACTED:
            counts, levels = _votes(name, kind, seed)
            winners = _winners(counts)
            row += [":".join(winners), ":".join(str(levels[letter]) for letter in winners)]
        rows.append(row)
    return _csv(rows)


def votes_csv(names: Iterable[str], *, seed: int = 0) -> bytes:
    """Return tabulatedVotes.csv: how many raters chose each emotion, by voice alone, face alone and both."""
    means = ["Emo", "Anger", "Disgust", "Fear", "Happy", "Neutral", "Sad"]
    levels = [f"mean{emotion}Resp" for emotion in means] + ["medianEmoResp"]
    header = [
        "",
        *VOTES,
        "fileName",
        "numResponses",
        "agreement",
        "emoVote",
        *levels,
        *(f"{name}Norm" for name in levels),
    ]
    rows: list[list[Any]] = [header]
    names = list(names)
    for modality, kind in enumerate(_SHARE_HEARD_AS_ACTED, start=1):
        for name in names:
            counts, by_letter = _votes(name, kind, seed)
            num_votes = sum(counts.values())
            heard = [by_letter[letter] if counts[letter] else -1 for letter in VOTES]
            mean = sum(by_letter[letter] * counts[letter] for letter in VOTES) / num_votes
            vote = ":".join(_winners(counts))
            facts = [name, num_votes, max(counts.values()) / num_votes, vote, *[mean, *heard, mean] * 2]
            rows.append([str(100_000 * modality + _stimuli()[name]), *counts.values(), *facts])
    return _csv(rows)


def vote_counts(name: str, kind: str = "Voice", *, seed: int = 0) -> dict[str, int]:
    """Return how many raters heard each emotion, letter -> count, in the tables that `write_crema_d` wrote.

    Args:
        name: of the clip.
        kind: Voice, Face or MultiModal.
        seed: of the tables.
    """
    return _votes(name, kind, seed)[0]


@functools.lru_cache(maxsize=32_768)
def _votes(name: str, kind: str, seed: int) -> tuple[dict[str, int], dict[str, float]]:
    """Return how many raters chose each letter, and how strong they found it."""
    rng = np.random.default_rng(zlib.crc32(f"{seed}:{name}:{kind}".encode()))
    acted = name.split("_")[2][0]
    share = _SHARE_HEARD_AS_ACTED[kind]
    shares = [share * (letter == acted) + (1 - share) * (0.5 if letter == "N" else 0.1) for letter in VOTES]
    counts = rng.multinomial(rng.integers(6, 13), shares).tolist()
    if kind == "Voice":
        counts = _KNOWN_VOTES.get(name, counts)
    levels = rng.uniform(20, 95, len(VOTES)).round(2).tolist()
    return dict(zip(VOTES, counts, strict=True)), dict(zip(VOTES, levels, strict=True))


def _winners(counts: Mapping[str, int]) -> list[str]:
    return [letter for letter in counts if counts[letter] == max(counts.values())]


def _sentence_file_names_csv(names: Iterable[str]) -> bytes:
    rows: list[list[Any]] = [["Stimulus_Number", "Filename"], *([_stimuli()[name], name] for name in names)]
    return _csv(rows).rstrip(b"\n")


@functools.cache
def _stimuli() -> dict[str, int]:
    return {name: number for number, name in enumerate(clip_names(), start=1)}


def _csv(rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a table as R writes it: strings quoted, numbers bare."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("ascii")


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
