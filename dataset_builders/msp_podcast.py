"""MSP-Podcast: turns of podcasts, rated for emotion by about five listeners each, with their speakers and sexes.

Releases 1.6 to 2.0 (73,042 clips and 114 hours in 1.8; 267,905 and 409 in 2.0) as delivered: 16 kHz, 2 to 12 seconds.
Speech is spontaneous: the label is the majority vote of the raters, stored as both `emotion` and `emotion_perceived`.
Splits are those of the corpus: Train, Validation (Development since 1.11) and test sets, which are reported
separately: prepare each with `test_sets`; the consensus table has the partition in `Split_Set`. Transcripts and word
times (TextGrid) are part of 1.11 and later.

All releases are read: `label`, `labels` or `Labels`; `concensus` up to 1.9; `Labels/Labels` (2.0); three tables of
single ratings. Known defects, handled and counted: clips without a speaker (a quarter of Train in 2.0), speakers in
two partitions, a row without audio (2.0), test set 3 without rows, a stereo clip at 44.1 kHz, raters with two ratings
of a clip, missing ratings. Files under `Previous_releases_information` are of other releases and are dropped.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hf_csm.data.text import normalize_text, split_words
from hf_csm.errors import UserError
from hf_csm.prepare.archive import Member
from hf_csm.prepare.builder import CorpusBuilder, CorpusConfig
from hf_csm.prepare.tabular import read_rows, read_text
from hf_csm.prepare.textgrid import UNKNOWN_WORD, TimedWord, place_words, read_words
from hf_csm.prepare.utterance import Skipped, Tally, Utterance


FILE_NAME = re.compile(r"MSP-PODCAST_(?:\d{4}_\d{4}(?:_\d{4})?|test3_\d{4})\.(?:wav|WAV)")
EARLIER_RELEASE = re.compile(r"(?:^|/)(?:previous_releases|files_removed_from)[^/]*/", re.IGNORECASE)
PACKED = (".tar.gz", ".tgz", ".tar")
EMOTIONS = {
    "A": "angry",
    "S": "sad",
    "H": "happy",
    "U": "surprised",
    "F": "fearful",
    "D": "disgust",
    "C": "contempt",
    "N": "neutral",
    "O": "other",
    "X": None,  # no majority
}
RATINGS = {
    "angry": "A",
    "sad": "S",
    "happy": "H",
    "surprise": "U",
    "fear": "F",
    "disgust": "D",
    "contempt": "C",
    "neutral": "N",
    "other": "O",
}
SPLITS = {
    "train": "train",
    "validation": "validation",
    "development": "validation",
    "test1": "test",
    "test2": "test",
    "test3": "test",
}
TEST_SETS = ("Test1", "Test2", "Test3")
COLUMNS = {"FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set"}
RATING_COLUMNS = (  # 1.7 to 1.12; 2.0; 1.6
    {"FileName", "EmoDetail"},
    {"FileName", "WorkerID", "EmoClass_Major"},
    {"FileName", "Workers", "EmoClass_Major"},
)
UNKNOWN_VALUES = ("", "nan", "none", "unknown")


@dataclass
class MspPodcastConfig(CorpusConfig):
    """Options of MSP-Podcast.

    Attributes:
        test_sets: partitions of the test split: Test1, Test2, Test3. Speakers of the others are not in train either.
        keep_unknown_speakers: keep clips with an unknown speaker, each with a speaker id of its own. They may be of a
            speaker of another split.
        allow_missing_text: accept clips without a transcript; their rows have no text.
    """

    test_sets: tuple[str, ...] = TEST_SETS
    keep_unknown_speakers: bool = False
    allow_missing_text: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.test_sets) <= set(TEST_SETS):
            raise UserError(
                f"msp_podcast: unknown test_sets {self.test_sets}.", f"Choose from {', '.join(TEST_SETS)}."
            )


@dataclass(frozen=True, slots=True)
class Label:
    """A row of the consensus table. `partition` is a key of `SPLITS`; attributes are 0..1."""

    partition: str
    speaker: str | None
    gender: str | None = None
    emotion: str | None = None
    arousal: float | None = None
    valence: float | None = None
    dominance: float | None = None


class MspPodcast(CorpusBuilder):
    """The MSP-Podcast corpus of the University of Texas at Dallas."""

    BUILDER_CONFIG_CLASS = MspPodcastConfig
    NAME = "msp_podcast"
    TITLE = "MSP-Podcast"
    LICENSE = "other"
    NOTICE = (
        "Lotfian R, Busso C (2019) Building Naturalistic Emotionally Balanced Speech Corpus by Retrieving Emotional "
        "Speech From Existing Podcast Recordings. IEEE Transactions on Affective Computing 10(4): 471-483. "
        "Used under a signed licence of the University of Texas at Dallas; not to be passed on."
    )
    HOMEPAGE = "https://www.lab-msp.com/MSP/MSP-Podcast.html"
    LABELS = EMOTIONS
    FILE_NAME = FILE_NAME
    NOT_TO_BE_PUBLISHED = "the license signed for MSP-Podcast prohibits distribution"

    def members(self, paths: list[str]) -> list[Member]:
        """List the files of the sources.

        Raises:
            UserError: the audio is still packed.
        """
        packed = [path for path in paths if path.endswith(PACKED)]
        members = [] if packed else super().members(paths)
        if not any(_is_audio(member) and _is_of_this_release(member) for member in members):
            packed += [str(member) for member in members if member.name.endswith(PACKED)]
            if packed:
                raise UserError(
                    f"{packed[0]}: the clips are still packed.",
                    "Extract them beside it (tar -xf), then name the folder of the corpus.",
                )
        return members

    def utterances(self, members: list[Member]) -> Iterator[Utterance | Skipped]:
        """Join audio, transcripts and TextGrids with the tables by the names of the clips."""
        ours = [member for member in members if _is_of_this_release(member)]
        labels = read_labels(ours)
        agreements, irregular = read_agreements(ours, labels)
        yield from irregular
        sidecars = find_sidecars(ours)
        if not sidecars and not self.config.allow_missing_text:
            raise UserError(
                "MSP-Podcast: no transcripts; releases before 1.11 have none.",
                "Put Transcripts/<clip>.txt beside Audios, from any speech recognizer, or set allow_missing_text.",
            )
        crossing = find_crossing_speakers(labels.values())
        seen: set[str] = set()
        for member in filter(_is_audio, members):
            name = f"{_stem(member.file_name)}.wav"
            label = labels.get(name)
            is_test3 = label is None and name.startswith("MSP-PODCAST_test3_")
            if is_test3:  # the authors do not publish its rows
                label = Label(partition="test3", speaker=f"test3-{name[-8:-4]}")
            if not _is_of_this_release(member):
                yield Skipped(member, "clip of an earlier release")
                continue
            if name in seen:
                yield Skipped(member, "second copy of a file")
            elif label is None:
                yield Skipped(member, "audio without a row in the consensus table", is_fault=True)
            elif reason := self._reason_to_drop(label, crossing):
                yield Skipped(member, reason)
            else:
                if is_test3:
                    yield Skipped(member, "Test3: no label and no speaker", action="noted")
                elif _stem(name) not in sidecars:
                    is_fault = not self.config.allow_missing_text
                    yield Skipped(member, "no transcript", is_fault, action="noted")
                if label.speaker is None:
                    yield Skipped(member, "unknown speaker, kept, possibly of another split", action="noted")
                yield describe(member, label, agreements.get(name), sidecars.get(_stem(name), ()))
            seen.add(name)
        for name in sorted(labels.keys() - seen):
            yield Skipped(name, "row of the consensus table without audio", is_fault=True)

    def complete(self, utterance: Utterance, tally: Tally) -> Utterance:
        """Read transcript and TextGrid; either gives the text.

        Raises:
            UserError: one of them is damaged.
        """
        text = ""
        aligned: tuple[TimedWord, ...] = ()
        for member in utterance.sidecars:
            if member.name.endswith(".txt"):
                text = read_text(member)
            else:
                aligned = read_words(member.read(), str(member))
        if any(character.isalnum() for character in text):
            text = normalize_text(text, str(utterance.member))
            words = place_words(split_words(text), aligned)
            if aligned and words is None:
                tally.add("noted", "transcript and TextGrid differ", utterance.member.file_name)
            return dataclasses.replace(utterance, text=text, words=words)
        known = tuple(word for word in aligned if word[0].lower() != UNKNOWN_WORD)
        if not known:
            if utterance.sidecars and not self.config.allow_missing_text:
                tally.add("noted", "no transcript", utterance.member.file_name)
            return utterance
        return dataclasses.replace(utterance, text=" ".join(word for word, _, _ in known), words=known)

    def _reason_to_drop(self, label: Label, crossing: Mapping[str, str]) -> str | None:
        if SPLITS[label.partition] == "test" and label.partition.capitalize() not in self.config.test_sets:
            return f"{label.partition.capitalize()} was not selected"
        if label.speaker is None:
            return None if self.config.keep_unknown_speakers else "unknown speaker, possibly of another split"
        split = crossing.get(label.speaker, SPLITS[label.partition])
        return None if split == SPLITS[label.partition] else f"its speaker is also in {split}"


def describe(member: Member, label: Label, agreement: float | None, sidecars: tuple[Member, ...]) -> Utterance:
    """Return the utterance of a clip with the labels of the tables; its text is in `sidecars`."""
    short_name = _stem(member.file_name).removeprefix("MSP-PODCAST_")
    return Utterance(
        id=f"msp_podcast-{short_name}",
        member=member,
        text=None,
        emotion_raw=label.emotion,
        emotion_perceived_raw=label.emotion,
        emotion_agreement=agreement,
        arousal=label.arousal,
        valence=label.valence,
        dominance=label.dominance,
        speaker_id=f"msp_podcast-{label.speaker or f'unknown-{short_name}'}",
        gender=label.gender,
        split=SPLITS[label.partition],
        sidecars=sidecars,
    )


def find_sidecars(members: Iterable[Member]) -> dict[str, tuple[Member, ...]]:
    """Return transcript and TextGrid of each clip, by the clip's name without suffix."""
    found: dict[str, dict[str, Member]] = {}
    for member in members:
        stem, _, suffix = member.file_name.rpartition(".")
        if suffix in ("txt", "TextGrid") and FILE_NAME.fullmatch(f"{stem}.wav"):
            found.setdefault(stem, {}).setdefault(suffix, member)
    return {stem: tuple(by_suffix.values()) for stem, by_suffix in found.items()}


def find_crossing_speakers(labels: Iterable[Label]) -> dict[str, str]:
    """Return the speakers of more than one split, each with its split here: test before validation."""
    splits: dict[str, set[str]] = {}
    for label in labels:
        if label.speaker is not None:
            splits.setdefault(label.speaker, set()).add(SPLITS[label.partition])
    return {
        speaker: "test" if "test" in found else "validation" for speaker, found in splits.items() if len(found) > 1
    }


def read_labels(members: Iterable[Member]) -> dict[str, Label]:
    """Return the row of the consensus table of each file name.

    Raises:
        UserError: there is no table, there are two different ones, or a value is invalid.
    """
    table = _find_table(members, r"labels_con[cs]ensus", ("csv", "json"))
    if table is None:
        raise UserError(
            "MSP-Podcast: no labels_consensus.csv (labels_concensus.csv up to 1.9).",
            "Put the folder Labels or Labels.zip of the release beside Audios.",
        )
    labels: dict[str, Label] = {}
    for where, row in _checked_rows(table, COLUMNS):
        name, label = row["FileName"], _label(row, where)
        if labels.setdefault(name, label) != label:
            raise UserError(f"{where}: a second, different row for {name}.", "Remove the wrong one.")
    return labels


def read_agreements(members: Iterable[Member], labels: Mapping[str, Label]) -> tuple[dict[str, float], list[Skipped]]:
    """Return the share of raters that agree with the label of each file name, and irregular ratings.

    Of several ratings of a rater, the last is used. Empty without the table of single ratings; clips without a
    majority are omitted.

    Raises:
        UserError: there are two different tables, or a damaged one.
    """
    table = _find_table(members, "labels_detailed", ("csv",))
    ratings: dict[str, dict[str, str]] = {}
    irregular = []
    for where, row in _checked_rows(table, *RATING_COLUMNS) if table else ():
        if "EmoDetail" in row:  # WORKER00000001; Other-confused; Concerned,Confused; A:3.000000; V:...; D:...;
            rater, _, rest = row["EmoDetail"].partition(";")
            emotion, is_whole, _ = rest.partition(";")
            if not is_whole:
                raise UserError(f"{where}: {row['EmoDetail']!r} is not a rating.", "Get the table again.")
        else:
            rater, emotion = row["WorkerID" if "WorkerID" in row else "Workers"], row["EmoClass_Major"]
        # Free text follows "Other-".
        code = RATINGS.get(emotion.strip().lower().partition("-")[0])
        by_rater = ratings.setdefault(row["FileName"], {})
        if code is None:
            irregular.append(Skipped(row["FileName"], "a rating with an unknown emotion", action="noted"))
            continue
        if rater in by_rater:
            irregular.append(Skipped(row["FileName"], "two ratings of a rater: the last is used", action="noted"))
        by_rater[sys.intern(rater)] = code  # a few thousand raters, two million ratings
    agreements = {}
    for name, by_rater in ratings.items():
        consensus = labels[name].emotion if name in labels else None
        if by_rater and consensus is not None and EMOTIONS.get(consensus) is not None:
            agreements[name] = sum(code == consensus for code in by_rater.values()) / len(by_rater)
    return agreements, irregular


def _label(row: Mapping[str, str], where: str) -> Label:
    partition = row["Split_Set"].lower()
    if partition not in SPLITS:
        raise UserError(f"{where}: unknown Split_Set {row['Split_Set']!r}.", f"Choose from {', '.join(SPLITS)}.")
    speaker, gender = row["SpkrID"], row["Gender"].lower()
    return Label(
        partition=partition,
        speaker=None if speaker.lower() in UNKNOWN_VALUES else speaker,
        gender=None if gender in UNKNOWN_VALUES else gender,
        emotion=row["EmoClass"],
        arousal=_attribute(row, "EmoAct", where),
        valence=_attribute(row, "EmoVal", where),
        dominance=_attribute(row, "EmoDom", where),
    )


def _attribute(row: Mapping[str, str], column: str, where: str) -> float | None:
    """Return a mean of ratings from 1 to 7 as 0..1."""
    try:
        mean = float(row[column] or "nan")
    except ValueError:
        mean = math.inf
    if math.isnan(mean):
        return None
    if not 1 <= mean <= 7:
        raise UserError(f"{where}: {column} is {row[column]!r}; not between 1 and 7.", "Get the table again.")
    return (mean - 1) / 6


def _find_table(members: Iterable[Member], name: str, suffixes: Iterable[str]) -> Member | None:
    """Return the table with the first available suffix; identical copies are accepted."""
    for suffix in suffixes:
        pattern = re.compile(rf"{name}\.{suffix}", re.IGNORECASE)
        found = [member for member in members if pattern.fullmatch(member.file_name)]
        for other in found[1:]:
            if other.read() != found[0].read():
                raise UserError(
                    f"{found[0]} and {other} differ: they are of two releases.",
                    "Keep the labels of the release of the audio, and remove the others.",
                )
        if found:
            return found[0]
    return None


def _checked_rows(table: Member, *schemas: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield location and cells of each row; they must have the columns of one of `schemas`."""
    for where, row in read_rows(table):
        if not any(schema <= row.keys() for schema in schemas):
            missing = ", ".join(sorted(schemas[0] - row.keys()))
            raise UserError(f"{where}: no column {missing}.", "Get the table of the release again.")
        yield where, row


def _is_audio(member: Member) -> bool:
    return member.name.lower().endswith(".wav")


def _is_of_this_release(member: Member) -> bool:
    return not EARLIER_RELEASE.search(member.name)


def _stem(file_name: str) -> str:
    return file_name.removesuffix(".wav").removesuffix(".WAV")
