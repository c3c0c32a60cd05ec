"""Encode recorded dialogues, listed in a moshi-finetune manifest, to a table of codes with both channels.

A manifest is a JSONL file of `{"path": "data_stereo/a.wav", "duration": 24.5}`. The audio is stereo, Moshi on the
left and the user on the right; `data_stereo/a.json` has `{"alignments": [["word", [0.1, 0.4], "SPEAKER_MAIN"]]}`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from hf_csm.data.audio import room_tone
from hf_csm.data.labels import EMOTIONS, UNLABELLED
from hf_csm.data.table import read_card_metadata
from hf_csm.encode.compose import MODEL, USER, Clip, Composition, Conversation, Turn, cut_units
from hf_csm.encode.report import EncodeReport, count_groups
from hf_csm.encode.run import encode_units
from hf_csm.errors import UserError
from hf_csm.files import read_json
from hf_csm.models.family import Codec
from hf_csm.units import (
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    Samples,
    Seconds,
    samples_to_seconds,
    seconds_to_samples,
)


MAIN_SPEAKER = "SPEAKER_MAIN"
SHORTEST_S = 1.0
"""Minimum length of the trailing partial window of a recording."""
DURATION_TOLERANCE_S = 0.5
SAMPLE_BYTES = 1 << 16
"""Bytes hashed at the beginning, middle and end of an audio file to detect changes."""
SPLIT_STEMS = ("train", "validation", "val", "dev", "test")
"""Manifest names that do not identify a corpus."""
NOTICE = "The manifest does not say under which terms its recordings may be used. Ask those who made them."


Alignment = tuple[str, Seconds, Seconds, str]
"""Word, start, end, speaker."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A row of a manifest.

    Attributes:
        name: used in ids; unique in the manifest.
        num_samples: at 24 kHz.
        sample_rate: of the file.
        first_speaker: of its words, by time; `None` if it has none.
    """

    name: str
    audio: Path
    num_samples: Samples
    sample_rate: int
    emotion: str | None
    language: str | None
    first_speaker: str | None


@dataclass(frozen=True, slots=True)
class Segment(Conversation):
    """A section of a recording that starts at sample `offset`, preceded by `lead` samples of room tone."""

    recording: int
    offset: Samples
    lead: Samples


def encode_manifest(
    manifest: Path,
    out: Path,
    codec: Codec,
    codec_sha256: str,
    *,
    composition: Composition | None = None,
    corpus: str | None = None,
    batch_s: float | None = None,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> EncodeReport:
    """Cut the dialogues of a manifest into windows and encode them, as rows of the split `train`.

    Batches, staging, resuming and sharing of the work are as for `encode`.

    Args:
        manifest: JSONL file; its paths are relative to its folder. A row may have an `emotion` (of Moshi's channel)
            and a `language`, such as `en`.
        composition: `duration_s` is the longest window; the other options shape the room tone that is inserted before
            a window with an emotion whose first word comes too early for the prefix.
        corpus: name in the rows and prefix of ids; by default that of the card beside the manifest, if there is one
            (`export_manifest` writes it), else the manifest's name, or its folder's if it is named after a split.

    Raises:
        UserError: the manifest or one of its files is missing or damaged, or `out` holds something else.
    """
    composition = composition or Composition()
    manifest = Path(manifest)
    card = _card_beside(manifest)
    title = manifest.resolve().parent.name if manifest.stem.lower() in SPLIT_STEMS else manifest.stem
    corpus = corpus or card.get("corpus") or re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "manifest"
    dialogues = Dialogues(manifest, corpus, composition)
    segments: dict[str, list[Segment]] = {}
    for segment in dialogues.segments:
        segments.setdefault(segment.emotion or UNLABELLED, []).append(segment)
    units = [unit for group in sorted(segments) for unit in cut_units("train", group, segments[group])]
    if not units:
        raise UserError(
            f"{manifest}: no recording in it is as long as {SHORTEST_S:g} s.", "Name a manifest of whole dialogues."
        )
    metadata = {
        **{"title": title, "license": "other", "notice": NOTICE, **card, "corpus": corpus},
        "manifest": manifest.name,
        "codec_sha256": codec_sha256,
        "composition": dataclasses.asdict(composition),
        "input_sha256": dialogues.sha256,
    }
    return encode_units(
        units,
        lambda _: dialogues,
        out,
        codec,
        metadata,
        EncodeReport(count_groups(units), noted=dict(dialogues.noted)),
        batch_s=batch_s,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )


def _card_beside(manifest: Path) -> dict[str, Any]:
    """Return corpus and terms from the card in the manifest's folder; empty if it has no card of hf-csm."""
    try:
        card = read_card_metadata(manifest.parent)
    except UserError:
        return {}
    return {key: card[key] for key in ("corpus", "builder", "title", "license", "notice") if key in card}


def read_rows(manifest: Path) -> list[tuple[str, str, Seconds | None, str | None, str | None]]:
    """Return location (for messages), path, duration, emotion and language of each row.

    Raises:
        UserError: the manifest is missing, or a row is invalid or names a file outside the folder.
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
    entries = read_json(path, remedy).get("alignments")
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


class Dialogues:
    """The recordings of a manifest, all checked before any is encoded; audio and words stay on disk.

    Attributes:
        segments: windows of all recordings, in order.
        noted: counts of dropped words and recordings, and of differences from the manifest.
        sha256: hash of the manifest, the alignments, and the sizes and some of the bytes of the audio files.
    """

    def __init__(self, manifest: Path, corpus: str, composition: Composition):
        self.noted: Counter[str] = Counter()
        self._corpus, self._composition = corpus, composition
        if composition.duration_s < composition.lead_in_s[1] + 2 * SHORTEST_S:
            raise UserError(
                f"Windows of {composition.duration_s:g} seconds are too short for dialogues.",
                "Give a longer --duration-sec or a shorter --lead-in-s.",
            )
        rows = read_rows(manifest)
        stems = Counter(Path(path).stem for _, path, *_ in rows)
        digest = hashlib.sha256(corpus.encode())
        self._recordings: list[Recording] = []
        for where, path, duration_s, emotion, language in rows:
            audio = manifest.parent / path
            num_samples, sample_rate = _examine(audio, where)
            if duration_s is not None and abs(duration_s - samples_to_seconds(num_samples)) > DURATION_TOLERANCE_S:
                self.noted["recordings of another duration than the manifest says"] += 1
            words = read_alignments(audio)
            digest.update(json.dumps([path, emotion, language, _sample_sha256(audio), words]).encode())
            stem = Path(path).stem
            name = stem if stems[stem] == 1 else "-".join(Path(path).with_suffix("").parts)
            first_speaker = words[0][3] if words else None
            if any(speaker == MAIN_SPEAKER for *_, speaker in words):
                first_speaker = MAIN_SPEAKER
            self._recordings.append(Recording(name, audio, num_samples, sample_rate, emotion, language, first_speaker))
        self.sha256 = digest.hexdigest()
        # If the manifest names a main speaker at all, a recording without that speaker is one in which Moshi listens.
        self._has_main = any(recording.first_speaker == MAIN_SPEAKER for recording in self._recordings)
        self.segments = [segment for index in range(len(self._recordings)) for segment in self._cut(index)]
        self.noted = +self.noted  # without zeros

    def waveform(self, conversation: Segment) -> np.ndarray:
        """Return a segment, float32 `[2, S]` at 24 kHz."""
        recording = self._recordings[conversation.recording]
        audio = _read_window(recording, conversation.offset, conversation.num_samples - conversation.lead)
        if not conversation.lead:
            return audio
        rng = np.random.default_rng(conversation.seed)
        lead = [room_tone(conversation.lead, rng, self._composition.room_tone_db) for _ in (MODEL, USER)]
        return np.concatenate([np.stack(lead), audio], axis=1)

    def words(self, conversation: Segment) -> list[dict]:
        """Return the words that begin in a segment, in the format of `WINDOW_FEATURES`."""
        recording = self._recordings[conversation.recording]
        return _words_in(conversation, self._place(recording, read_alignments(recording.audio)))

    def _place(self, recording: Recording, alignments: list[Alignment]) -> list[dict]:
        """Return the words that have a duration and begin in their recording, with their channel, by time."""
        main = MAIN_SPEAKER if self._has_main else recording.first_speaker
        duration_s = samples_to_seconds(recording.num_samples)
        return [
            {"word": word, "start_s": start_s, "end_s": end_s, "channel": MODEL if speaker == main else USER}
            for word, start_s, end_s, speaker in alignments
            if 0.0 <= start_s < min(end_s, duration_s)
        ]

    def _cut(self, index: int) -> Iterator[Segment]:
        recording, composition = self._recordings[index], self._composition
        alignments = read_alignments(recording.audio)
        words = self._place(recording, alignments)
        self.noted["words outside their recording or without duration, left out"] += len(alignments) - len(words)
        longest = seconds_to_samples(composition.duration_s) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
        offset = number = 0
        while recording.num_samples - offset >= seconds_to_samples(SHORTEST_S):
            id_ = f"{recording.name}-{number:04d}"
            rng = np.random.default_rng([composition.seed, zlib.crc32(id_.encode())])
            lead = 0
            if recording.emotion is not None:
                begin_s = samples_to_seconds(offset)
                first_s = min((word["start_s"] for word in words if word["start_s"] >= begin_s), default=math.inf)
                if first_s - begin_s < composition.lead_in_s[0]:
                    lead = seconds_to_samples(rng.uniform(*composition.lead_in_s))
            num_samples = min(longest, lead + recording.num_samples - offset) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME
            segment = Segment(
                id=id_,
                speaker_id=f"{self._corpus}-{recording.name}",
                language=recording.language,
                emotion=recording.emotion,
                variant=0,
                turns=(),
                num_samples=num_samples,
                seed=int(rng.integers(2**31)),
                recording=index,
                offset=offset,
                lead=lead,
            )
            yield dataclasses.replace(segment, turns=_turns(segment, _words_in(segment, words)))
            offset += num_samples - lead
            number += 1
        if recording.num_samples - offset >= SAMPLES_PER_FRAME:
            self.noted["rests of under 1 s, left out"] += 1


def _words_in(segment: Segment, words: list[dict]) -> list[dict]:
    """Return those of a recording's words that begin in a segment, in seconds from its first sample."""
    begin_s = samples_to_seconds(segment.offset)
    end_s = samples_to_seconds(segment.offset + segment.num_samples - segment.lead)
    shift_s = samples_to_seconds(segment.lead) - begin_s
    return [
        {**word, "start_s": word["start_s"] + shift_s, "end_s": min(word["end_s"], end_s) + shift_s}
        for word in words
        if begin_s <= word["start_s"] < end_s
    ]


def _turns(segment: Segment, words: list[dict]) -> tuple[Turn, ...]:
    """Return one turn for each run of words of one channel; its clip is the recording."""
    turns: list[Turn] = []
    for channel, run in itertools.groupby(words, key=lambda word: word["channel"]):
        words_of_turn = list(run)
        start = seconds_to_samples(words_of_turn[0]["start_s"])
        num_samples = seconds_to_samples(max(word["end_s"] for word in words_of_turn)) - start
        clip = Clip(
            place=(segment.recording, 0),
            id=segment.speaker_id,
            speaker_id=segment.speaker_id,
            language=segment.language,
            emotion=segment.emotion,
            offset=segment.offset + start - segment.lead,
            num_samples=num_samples,
        )
        turns.append(Turn(clip, channel, start))
    return tuple(turns)


def _examine(audio: Path, where: str) -> tuple[Samples, int]:
    """Return the length at 24 kHz and the sample rate of a stereo file."""
    if not audio.is_file():
        raise UserError(f"{where}: {audio} does not exist.", "Correct the path, or remove the line.")
    try:
        info = soundfile.info(str(audio))
    except soundfile.LibsndfileError as error:
        raise UserError(
            f"{where}: {audio} is not a sound file that can be read.", "Get this file again, or remove the line."
        ) from error
    if info.channels != 2:
        raise UserError(
            f"{where}: {audio} has {info.channels} channel{'s' * (info.channels > 1)}.",
            "Two are needed: Moshi's voice on the left, the user's on the right.",
        )
    return info.frames * SAMPLE_RATE // info.samplerate, info.samplerate


def _sample_sha256(audio: Path) -> str:
    """Return a hash of the size and of the first, middle and last bytes of a file, which may be large."""
    size = audio.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with audio.open("rb") as file:
        for offset in (0, (size - SAMPLE_BYTES) // 2, size - SAMPLE_BYTES):
            file.seek(max(offset, 0))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _read_window(recording: Recording, offset: Samples, num_samples: Samples) -> np.ndarray:
    """Read a section of a recording: float32 `[2, S]` at 24 kHz."""
    # From a whole second, which is a whole sample at both rates, with a second on either side for the filter.
    first_s = max(offset // SAMPLE_RATE - 1, 0)
    last_s = -(-(offset + num_samples) // SAMPLE_RATE) + 1
    try:
        with soundfile.SoundFile(str(recording.audio)) as file:
            file.seek(first_s * recording.sample_rate)
            samples = file.read((last_s - first_s) * recording.sample_rate, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise UserError(f"{recording.audio}: cannot be read: {error}", "Get this file again.") from error
    if recording.sample_rate != SAMPLE_RATE:
        samples = soxr.resample(samples, recording.sample_rate, SAMPLE_RATE)
    window = samples[offset - first_s * SAMPLE_RATE :][:num_samples].T
    if window.shape != (2, num_samples):
        raise UserError(f"{recording.audio}: shorter than its header says.", "Copy or download this file again.")
    return window
