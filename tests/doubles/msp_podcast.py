"""An MSP-Podcast of synthetic clips: names, folders, tables and known defects of a release, at any size.

    from tests.doubles.msp_podcast import write_msp_podcast
    write_msp_podcast("raw", num_clips=500, release="2.0")      # raw/Audios, raw/Labels, raw/Transcripts, ...

20,000 clips of 5 s take about two minutes of one core and 3.5 GB.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from hf_csm.testing.synthesizer import synthesize


Release = Literal["1.6", "1.8", "1.11", "2.0"]


@dataclass(frozen=True)
class Emotion:
    """A class of the corpus: clips in release 1.8, what raters call it, mean attributes, style of the synthesizer.

    `attributes` are arousal, valence and dominance, 1 to 7.
    """

    num_clips: int
    rating: str
    attributes: tuple[float, float, float]
    style: str


EMOTIONS = {
    "N": Emotion(26_009, "Neutral", (3.8, 4.0, 4.0), "neutral"),
    "H": Emotion(14_285, "Happy", (4.9, 5.4, 4.7), "happy"),
    "X": Emotion(14_199, "", (4.2, 3.9, 4.1), "calm"),
    "U": Emotion(4_084, "Surprise", (5.0, 4.3, 4.4), "surprised"),
    "C": Emotion(3_644, "Contempt", (4.0, 2.9, 4.4), "disgust"),
    "A": Emotion(3_218, "Angry", (5.5, 2.4, 5.2), "angry"),
    "S": Emotion(2_649, "Sad", (3.0, 2.5, 3.2), "sad"),
    "D": Emotion(2_593, "Disgust", (4.0, 2.7, 4.2), "disgust"),
    "F": Emotion(1_544, "Fear", (4.5, 2.9, 3.4), "fearful"),
    "O": Emotion(817, "Other-confused, or amused", (4.0, 3.8, 4.0), "calm"),
}
PARTITIONS = {"Train": 0.62, "Development": 0.12, "Test1": 0.19, "Test2": 0.07}
"""Share of the clips, and of the speakers."""

# Places of the defects in the table.
RATED_TWICE, RATING_MISSING, STEREO, CROSSING, WITHOUT_AUDIO, WITHOUT_TEXT, UNKNOWN_WORD = 1, 2, 3, 4, 8, 9, 10
UNKNOWN_SPEAKER_EVERY = 6
FEWEST_FOR_FAULTS = 300
"""With fewer clips, one without its audio or transcript would be more than a builder takes."""

_WORDS = (
    "so we were talking about the weather and then somebody came in to say that it is not going to rain today but "
    "I do not believe any of it because yesterday they told us the same thing well-known people really said"
)
_S_PER_CHARACTER = 0.077  # of the synthesizer
_QUIET_S = (0.1, 0.4)
_CLIPS_OF_PODCAST = 40
_FEWEST_FOR_PROCESSES = 200


@dataclass(frozen=True)
class Clip:
    """A clip before its sound is made. A rating is rater, class ("" if it is missing), and three attributes."""

    name: str
    text: str
    emotion: str
    partition: str
    speaker: int
    is_known: bool
    ratings: tuple[tuple[str, str, int, int, int], ...]
    seed: tuple[int, int]


def write_msp_podcast(
    folder: str | Path,
    *,
    num_clips: int = 300,
    release: Release = "1.11",
    num_speakers: int = 20,
    duration_s: tuple[float, float] = (2.75, 8.0),
    nested: bool = False,
    transcripts: bool = True,
    textgrids: bool = True,
    zipped_text: bool = False,
    defects: bool = True,
    seed: int = 0,
) -> Path:
    """Write a corpus and return `folder`.

    Args:
        folder: is made.
        num_clips: rows of the consensus table.
        release: decides spellings, partition names and the columns of single ratings.
        num_speakers: known ones, at least four; each is of one partition.
        duration_s: about the shortest and the longest clip.
        nested: folders in folders of the same name, as 2.0 unpacks.
        transcripts: write them; releases before 1.11 come without.
        textgrids: write word times of forced alignment; releases before 1.11 come without.
        zipped_text: zips instead of folders of labels, transcripts and word times.
        defects: unknown speakers, a speaker of two partitions, test set 3 without rows, a stereo clip at 44.1 kHz, a
            rater who rated twice, a missing rating, a word the aligner did not know, files of an earlier release; and
            from 300 clips on a row without audio and a clip without text.
        seed: of everything.
    """
    folder = Path(folder)
    clips = plan_clips(num_clips, num_speakers, duration_s, defects, seed)
    test3 = _plan_test3(clips, 1 + num_clips // 100) if defects else []
    has_faults = defects and num_clips >= FEWEST_FOR_FAULTS
    made = [*(clip for index, clip in enumerate(clips) if not (has_faults and index == WITHOUT_AUDIO)), *test3]
    audio = _folder(folder, "Audios", nested)
    texts: dict[str, str] = {}
    grids: dict[str, str] = {}
    tasks = [(clip, audio, defects and clip is clips[STEREO]) for clip in made]
    for clip, words in zip(made, _write_audio(tasks), strict=True):
        if clip.partition == "Test3" or (has_faults and clip is clips[WITHOUT_TEXT]):
            continue
        if transcripts:
            texts[f"{clip.name}.txt"] = f"{clip.text}\n"
        if textgrids:
            has_unknown = defects and num_clips > UNKNOWN_WORD and clip is clips[UNKNOWN_WORD]
            grids[f"{clip.name}.TextGrid"] = text_grid(words, has_unknown)
    labels = "label" if release == "1.6" else "Labels"
    for name, files in ((labels, tables(clips, release)), ("Transcripts", texts), ("ForceAligned", grids)):
        if files:
            _write_files(folder, name, files, nested, zipped_text)
    (folder / "readme.txt").write_text("Synthetic clips in the form of MSP-Podcast.\n")
    (folder / "Partitions.txt").write_text("".join(f"{clip.partition}; {clip.name}.wav\n" for clip in clips))
    if defects:
        earlier = folder / "Previous_releases_information"
        removed = earlier / "files_removed_from_prev_versions" / "v1.0_removed_files"
        list(_write_audio([(dataclasses.replace(clips[0], name="MSP-PODCAST_0001_0001"), removed, False)]))
        _write_files(earlier, "v1.0", tables(clips[1:2], "1.8"), nested=False, is_zipped=False)
    return folder


def plan_clips(
    num_clips: int, num_speakers: int, duration_s: tuple[float, float], defects: bool = True, seed: int = 0
) -> list[Clip]:
    """Return the clips of the table: all partitions are among the first 4, all classes among the first 10."""
    rng = np.random.default_rng(seed)
    speakers = _deal_speakers(num_speakers)
    partitions = [*PARTITIONS, *rng.choice([*PARTITIONS], max(0, num_clips - 4), p=[*PARTITIONS.values()])]
    weights = np.array([emotion.num_clips for emotion in EMOTIONS.values()])
    codes = [*EMOTIONS, *rng.choice([*EMOTIONS], max(0, num_clips - 10), p=weights / weights.sum())]
    clips: list[Clip] = []
    for index, (partition, code) in enumerate(zip(partitions[:num_clips], codes, strict=False)):
        podcast, turn = 1 + index // _CLIPS_OF_PODCAST, 8 + index % _CLIPS_OF_PODCAST
        part = f"_{1 + index % 3:04d}" if index % 4 == 3 else ""
        speaker = int(rng.choice(speakers[partition]))
        if defects and index == CROSSING:
            partition, speaker = "Train", clips[list(PARTITIONS).index("Test2")].speaker
        clip = Clip(
            name=f"MSP-PODCAST_{podcast:04d}_{turn:04d}{part}",
            text=_text(rng, duration_s),
            emotion=str(code),
            partition=str(partition),
            speaker=speaker,
            is_known=not defects or (index + 1) % UNKNOWN_SPEAKER_EVERY != 0,
            ratings=_ratings(str(code), rng),
            seed=(seed, index),
        )
        if defects and index == RATED_TWICE:
            clip = dataclasses.replace(clip, ratings=(*clip.ratings, clip.ratings[0]))
        if defects and index == RATING_MISSING:
            clip = dataclasses.replace(clip, ratings=(*clip.ratings, ("WORKER00009999", "", 4, 4, 4)))
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
        has_unknown: whether the first is one the aligner did not know.
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


def _deal_speakers(num_speakers: int) -> dict[str, range]:
    assert num_speakers >= len(PARTITIONS), num_speakers
    first, dealt = 1, {}
    for left, (partition, share) in zip((3, 2, 1, 0), PARTITIONS.items(), strict=True):
        end = min(first + max(1, round(share * num_speakers)), num_speakers + 1 - left) if left else num_speakers + 1
        dealt[partition] = range(first, end)
        first = end
    return dealt


def _plan_test3(clips: Sequence[Clip], num_clips: int) -> list[Clip]:
    return [
        dataclasses.replace(
            clip, name=f"MSP-PODCAST_test3_{number:04d}", partition="Test3", seed=(*clip.seed[:1], 10_000_000 + number)
        )
        for number, clip in zip(range(1, num_clips + 1), clips, strict=False)
    ]


def _text(rng: np.random.Generator, duration_s: tuple[float, float]) -> str:
    num_characters = (rng.uniform(*duration_s) - sum(_QUIET_S)) / _S_PER_CHARACTER
    words: list[str] = []
    while not words or len(" ".join(words)) < num_characters:
        words.append(str(rng.choice(_WORDS.split())))
    return " ".join(words).capitalize() + "."


def _ratings(code: str, rng: np.random.Generator) -> tuple[tuple[str, str, int, int, int], ...]:
    """Return five ratings: at least three are `code`, which nobody else beats; two and two tie for X."""
    others = [str(other) for other in rng.permutation([key for key in EMOTIONS if key not in (code, "X")])]
    num_agreeing = int(rng.integers(3, 6))
    chosen = (
        [code] * num_agreeing + others[: 5 - num_agreeing] if code != "X" else [*others[:2], *others[:2], others[2]]
    )
    raters = rng.choice(10_000, 5, replace=False)
    attributes = np.clip(np.rint(rng.normal(EMOTIONS[code].attributes, 0.8, (5, 3))), 1, 7).astype(int).tolist()
    return tuple(
        (f"WORKER{rater:08d}", emotion, *axes) for rater, emotion, axes in zip(raters, chosen, attributes, strict=True)
    )


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


def _rating(clip: Clip, rating: tuple[str, str, int, int, int], release: Release) -> dict[str, Any]:
    rater, code, arousal, valence, dominance = rating
    emotion = EMOTIONS[code].rating if code else "NaN"
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


def _folder(folder: Path, name: str, nested: bool) -> Path:
    return folder / name / name if nested else folder / name


def _write_files(folder: Path, name: str, files: Mapping[str, str], nested: bool, is_zipped: bool) -> None:
    if is_zipped:
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file_name, content in files.items():
                archive.writestr(f"{name}/{file_name}", content)
        return
    target = _folder(folder, name, nested)
    target.mkdir(parents=True, exist_ok=True)
    for file_name, content in files.items():
        (target / file_name).write_text(content, encoding="utf-8")


def _write_clip(task: tuple[Clip, Path, bool]) -> list[dict[str, Any]]:
    """Write the wav of a clip, as stereo at 44.1 kHz if asked to, and return its words with their times."""
    clip, folder, is_odd = task
    sample_rate = 44_100 if is_odd else 16_000
    samples, words = synthesize(
        clip.text,
        speaker=clip.speaker,
        emotion=EMOTIONS[clip.emotion].style,
        sample_rate=sample_rate,
        seed=np.random.SeedSequence(clip.seed).generate_state(1).item(),
        lead_s=_QUIET_S,
        tail_s=_QUIET_S,
    )
    content = np.stack([samples, samples], axis=1) if is_odd else samples
    soundfile.write(folder / f"{clip.name}.wav", content, sample_rate, subtype="PCM_16")
    return words


def _write_audio(tasks: Sequence[tuple[Clip, Path, bool]]) -> Iterator[list[dict[str, Any]]]:
    """Write the clips, by all cores if there are many, and yield the words of each in order."""
    for folder in {folder for _, folder, _ in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    if len(tasks) < _FEWEST_FOR_PROCESSES:
        yield from map(_write_clip, tasks)
        return
    method = "fork" if os.name == "posix" and os.uname().sysname == "Linux" else "spawn"
    with ProcessPoolExecutor(mp_context=get_context(method)) as pool:
        yield from pool.map(_write_clip, tasks, chunksize=16)
