"""MSP-Podcast with synthetic clips: file names, folders, tables and known defects of its releases, at any size.

    from tests.doubles.msp_podcast import write_msp_podcast
    write_msp_podcast("raw", num_clips=500, release="2.0")      # raw/Audios, raw/Labels, raw/Transcripts, ...

20,000 clips of 5 s take about two minutes of one core and 3.5 GB.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from hf_csm.testing.synthesizer import synthesize


Release = Literal["1.6", "1.8", "1.11", "2.0"]
Rating = tuple[str, str, int, int, int]

RATED_AS = {
    **{"N": "Neutral", "H": "Happy", "X": "", "U": "Surprise", "C": "Contempt", "A": "Angry", "S": "Sad"},
    **{"D": "Disgust", "F": "Fear", "O": "Other-confused, or amused"},
}
"""The classes, and their names in single ratings; X is no agreement."""
_STYLES = {"N": "neutral", "H": "happy", "U": "surprised", "A": "angry", "S": "sad", "D": "disgust", "F": "fearful"}
_SHARES = {"Train": 0.62, "Development": 0.12, "Test1": 0.19, "Test2": 0.07}
_WORDS = [
    "so",
    "we",
    "were",
    "talking",
    "about",
    "the",
    "weather",
    "and",
    "then",
    "somebody",
    "came",
    "in",
    "because",
    "well-known",
    "people",
    "really",
    "said",
]
_S_PER_CHARACTER = 0.077  # of the synthesizer
_QUIET_S = (0.1, 0.4)

# Places of the defects in the table.
RATED_TWICE, RATING_MISSING, STEREO, CROSSING, UNKNOWN_WORD, UNKNOWN_SPEAKER_EVERY = 1, 2, 3, 4, 10, 6


@dataclass(frozen=True)
class Clip:
    """A clip without its audio. A rating is rater, class ("" if it is missing), and three attributes from 1 to 7."""

    name: str
    text: str
    emotion: str
    partition: str
    speaker: int
    is_known: bool
    ratings: tuple[Rating, ...]


def write_msp_podcast(
    folder: str | Path,
    *,
    num_clips: int = 300,
    release: Release = "1.11",
    num_speakers: int = 20,
    duration_s: tuple[float, float] = (2.75, 8.0),
    nested: bool = False,
    zipped_text: bool = False,
    defects: bool = True,
) -> Path:
    """Write a corpus and return `folder`.

    Args:
        folder: is made.
        num_clips: rows of the consensus table.
        release: determines spellings, partition names and the columns of single ratings.
        num_speakers: at least 4; no speaker is in two partitions.
        duration_s: range of the clips' durations.
        nested: `Audios/Audios/` and so on, as some mirrors unpack it.
        zipped_text: zips instead of folders of labels, transcripts and word times.
        defects: unknown speakers, a speaker of two partitions, test set 3 without rows, a stereo clip at 44.1 kHz, a
            rater who rated twice, a missing rating, a word without alignment, files of an earlier release.
    """
    folder = Path(folder)
    clips = plan_clips(num_clips, num_speakers, duration_s, defects)
    audio = folder / "Audios" / "Audios" if nested else folder / "Audios"
    audio.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    grids: dict[str, str] = {}
    for index, clip in enumerate(clips):
        words = _write_clip(audio, clip, is_stereo=defects and index == STEREO)
        texts[f"{clip.name}.txt"] = f"{clip.text}\n"
        grids[f"{clip.name}.TextGrid"] = text_grid(words, has_unknown=defects and index == UNKNOWN_WORD)
    labels = "label" if release == "1.6" else "Labels"
    for name, files in ((labels, tables(clips, release)), ("Transcripts", texts), ("ForceAligned", grids)):
        _write_files(folder, name, files, nested, zipped_text)
    (folder / "Partitions.txt").write_text("".join(f"{clip.partition}; {clip.name}.wav\n" for clip in clips))
    if defects:
        _write_clip(audio, dataclasses.replace(clips[0], name="MSP-PODCAST_test3_0001"))
        earlier = folder / "Previous_releases_information"
        removed = earlier / "files_removed_from_prev_versions" / "v1.0_removed_files"
        removed.mkdir(parents=True)
        _write_clip(removed, dataclasses.replace(clips[0], name="MSP-PODCAST_0001_0001"))
        _write_files(earlier, "v1.0", tables(clips[1:2], "1.8"), nested=False, is_zipped=False)
    return folder


def plan_clips(num_clips: int, num_speakers: int, duration_s: tuple[float, float], defects: bool = True) -> list[Clip]:
    """Return the clips of the table: all partitions are among the first 4, all classes among the first 10."""
    rng = np.random.default_rng(0)
    partitions = [*_SHARES, *rng.choice([*_SHARES], max(0, num_clips - 4), p=[*_SHARES.values()])]
    ends = np.ceil(np.cumsum([0, *_SHARES.values()]) * (num_speakers - 4)).astype(int) + range(5)
    first_and_end = {partition: (ends[i] + 1, ends[i + 1] + 1) for i, partition in enumerate(_SHARES)}
    clips: list[Clip] = []
    for index, partition in enumerate(partitions[:num_clips]):
        code = [*RATED_AS][index % 10]
        speaker = int(rng.integers(*first_and_end[str(partition)]))
        if defects and index == CROSSING:
            partition, speaker = "Train", clips[list(_SHARES).index("Test2")].speaker
        ratings = _ratings(code)
        if defects and index == RATED_TWICE:
            ratings = (*ratings, ratings[0])
        if defects and index == RATING_MISSING:
            ratings = (*ratings, ("WORKER00009999", "", 4, 4, 4))
        clip = Clip(
            name=f"MSP-PODCAST_{1 + index // 40:04d}_{8 + index % 40:04d}" + ("_0001" if index % 4 == 3 else ""),
            text=_text(rng, duration_s),
            emotion=code,
            partition=str(partition),
            speaker=speaker,
            is_known=not defects or (index + 1) % UNKNOWN_SPEAKER_EVERY != 0,
            ratings=ratings,
        )
        clips.append(clip)
    return clips


def tables(clips: Sequence[Clip], release: Release) -> dict[str, str]:
    """Return the label files of a release by name."""
    rows = [_consensus(clip, release) for clip in clips]
    spelling = "consensus" if release in ("1.11", "2.0") else "concensus"
    by_name = {row["FileName"]: {key: value for key, value in row.items() if key != "FileName"} for row in rows}
    ratings = [_rating(clip, rating, release) for clip in clips for rating in clip.ratings]
    return {
        f"labels_{spelling}.csv": _csv(rows),
        f"labels_{spelling}.json": json.dumps(by_name),
        "labels_detailed.csv": _csv(ratings),
    }


def text_grid(words: Sequence[Mapping[str, Any]], has_unknown: bool = False) -> str:
    """Return a TextGrid as a forced aligner writes it: lower case, no punctuation, compounds in pieces.

    Args:
        words: `word`, `start_s` and `end_s` of each.
        has_unknown: whether the first is a word that the aligner does not have.
    """
    end_s = words[-1]["end_s"] + _QUIET_S[0]
    intervals: list[tuple[float, float, str]] = []
    position_s = 0.0
    for word in words:
        pieces = word["word"].lower().strip(".,!").split("-")
        if has_unknown and word is words[0]:
            pieces = ["<unk>"]
        times = np.linspace(word["start_s"], word["end_s"], len(pieces) + 1).round(6).tolist()
        if times[0] > position_s:
            intervals.append((position_s, times[0], ""))
        intervals += zip(times[:-1], times[1:], pieces, strict=True)
        position_s = times[-1]
    intervals.append((position_s, end_s, ""))
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end_s}"]
    lines += ["tiers? <exists>", "size = 2", "item []:"]
    for number, tier in enumerate(("words", "phones"), start=1):
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{tier}"']
        lines += ["        xmin = 0", f"        xmax = {end_s}", f"        intervals: size = {len(intervals)}"]
        for index, (start, end, label) in enumerate(intervals, start=1):
            label = label if tier == "words" or not label else "AH0"
            lines += [f"        intervals [{index}]:", f"            xmin = {start}", f"            xmax = {end}"]
            lines += [f'            text = "{label}"']
    return "\n".join(lines) + "\n"


def _text(rng: np.random.Generator, duration_s: tuple[float, float]) -> str:
    num_characters = (rng.uniform(*duration_s) - sum(_QUIET_S)) / _S_PER_CHARACTER
    words: list[str] = []
    while not words or len(" ".join(words)) < num_characters:
        words.append(str(rng.choice(_WORDS)))
    return " ".join(words).capitalize() + "."


def _ratings(code: str) -> tuple[Rating, ...]:
    """Return five ratings: three are of the class; for X, two and two are of others."""
    others = ["A", "S", "H"] if code in "NXO" else ["N", "O", "C" if code != "C" else "D"]
    chosen = [code, code, code, *others[:2]] if code != "X" else [*others[:2], *others[:2], others[2]]
    return tuple((f"WORKER{rater:08d}", chosen[rater], 3 + rater % 3, 4, 5) for rater in range(5))


def _consensus(clip: Clip, release: Release) -> dict[str, str]:
    arousal, valence, dominance = np.mean([rating[2:] for rating in clip.ratings if rating[1]], axis=0).round(6)
    is_early = release in ("1.6", "1.8")
    return {
        "FileName": f"{clip.name}.wav",
        "EmoClass": clip.emotion,
        "EmoAct": str(arousal),
        "EmoVal": str(valence),
        "EmoDom": str(dominance),
        "SpkrID": str(clip.speaker) if clip.is_known else "Unknown",
        "Gender": ("Male" if clip.speaker % 2 else "Female") if clip.is_known else "Unknown",
        "Split_Set": "Validation" if is_early and clip.partition == "Development" else clip.partition,
    }


def _rating(clip: Clip, rating: Rating, release: Release) -> dict[str, Any]:
    rater, code, arousal, valence, dominance = rating
    emotion = RATED_AS[code] if code else "NaN"
    name = f"{clip.name}.wav"
    if release in ("1.8", "1.11"):
        attributes = f"A:{arousal:.6f}; V:{valence:.6f}; D:{dominance:.6f};"
        return {"FileName": name, "EmoDetail": f"{rater}; {emotion}; Concerned,Confused; {attributes}"}
    return {
        "FileName": name,
        "WorkerID" if release == "2.0" else "Workers": rater,
        "EmoClass_Major": emotion,
        "EmoClass_Second": "Concerned,Confused",
        "EmoAct": arousal,
        "EmoVal": valence,
        "EmoDom": dominance,
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _write_files(folder: Path, name: str, files: Mapping[str, str], nested: bool, is_zipped: bool) -> None:
    if is_zipped:
        with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file_name, content in files.items():
                archive.writestr(f"{name}/{file_name}", content)
        return
    target = folder / name / name if nested else folder / name
    target.mkdir(parents=True, exist_ok=True)
    for file_name, content in files.items():
        (target / file_name).write_text(content, encoding="utf-8")


def _write_clip(folder: Path, clip: Clip, *, is_stereo: bool = False) -> list[dict[str, Any]]:
    """Write the wav of a clip, stereo at 44.1 kHz if asked to, and return its words with their times."""
    sample_rate = 44_100 if is_stereo else 16_000
    samples, words = synthesize(
        clip.text,
        speaker=clip.speaker,
        emotion=_STYLES.get(clip.emotion, "calm"),
        sample_rate=sample_rate,
        seed=zlib.crc32(clip.name.encode()),
        lead_s=_QUIET_S,
        tail_s=_QUIET_S,
    )
    content = np.stack([samples, samples], axis=1) if is_stereo else samples
    soundfile.write(folder / f"{clip.name}.wav", content, sample_rate, subtype="PCM_16")
    return words
